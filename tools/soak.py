"""Train for a thousand steps in one process: does memory grow, do steps get slower?

usage: soak.py [--steps N] [--out FILE]

Memory: what is resident after a step, median of twenty steps: those up to step 100 against the last ones.
Throughput: median seconds per step, steps 51 to 150 against the last hundred; only valid on a quiet machine.
Exit code 1 where memory grew by more than 5 %. Every hundredth step is evaluated, every 250th saved.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from short_runs import short_run
from transformers import TrainerCallback

from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.output_space import TopKKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.teachers import Teacher
from oprd_nb.training.config import OPRDConfig
from oprd_nb.training.trainer import OPRDTrainer

RESULTS = Path(__file__).parents[1] / "nbs" / "results" / "soak.json"
MOST_GROWTH = 0.05


def resident_bytes() -> int:
    """What this process holds in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class Watch(TrainerCallback):
    """Writes down memory, time and the number of Python's objects after every step."""

    def __init__(self):
        self.memory: list[int] = []
        self.times: list[float] = []
        self.objects: list[int] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.memory.append(resident_bytes())
        self.times.append(time.monotonic())
        if state.global_step % 100 == 0:
            gc.collect()
            self.objects.append(len(gc.get_objects()))


def train(steps: int, folder: str) -> Watch:
    """Train the embedded pair; returns what was written down."""
    pair = embedded("same")
    args = short_run(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=OPRDConfig.gradient_accumulation_steps,
        max_completion_length=24,
        save_strategy="steps",
        save_steps=250,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=100,
    )
    watch = Watch()
    trainer = OPRDTrainer(
        model=pair.student,
        teacher=Teacher(pair.teacher, pair.tokenizer),
        args=args,
        objective=TopKKL(4) + Representation(),
        train_dataset=pair.task.train,
        eval_dataset=pair.task.validation.select(range(8)),
        processing_class=pair.tokenizer,
        callbacks=[watch],
    )
    trainer.train()
    return watch


def growth(early: float, late: float) -> float:
    """How much larger the later value is, as a share of the earlier one."""
    return round(late / early - 1, 4)


def measured(watch: Watch) -> dict:
    """The comparison of early and late steps."""
    seconds = [late - early for early, late in zip(watch.times, watch.times[1:], strict=False)]
    memory = statistics.median(watch.memory[80:100]), statistics.median(watch.memory[-20:])
    pace = statistics.median(seconds[50:150]), statistics.median(seconds[-100:])
    return {
        "steps": len(watch.memory),
        "memory_early_mib": round(memory[0] / 2**20, 1),
        "memory_late_mib": round(memory[1] / 2**20, 1),
        "memory_growth": growth(*memory),
        "memory_mib_every_100": [round(value / 2**20, 1) for value in watch.memory[99::100]],
        "objects_every_100": watch.objects,
        "step_early_s": round(pace[0], 4),
        "step_late_s": round(pace[1], 4),
        "step_growth": growth(*pace),
    }


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.steps < 200:
        parser.error(f"--steps {options.steps}: early and late steps need at least 200")
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measured(train(options.steps, folder))
    text = json.dumps(found, indent=1)
    options.out.write_text(text + "\n")
    print(text)
    return int(found["memory_growth"] > MOST_GROWTH)


if __name__ == "__main__":
    sys.exit(main())
