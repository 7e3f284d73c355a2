"""A real language model gets better: the pair of models, and what is stored of a sweep.

    make smollm2
    python examples/real_pair.py pair       # student and teacher, once: about 15 minutes
    oprd eval runs/real/student runs/real/teacher --task words --limit 200 --samples 4 --max_new_tokens 48 \\
      --outside runs/real/teacher --out runs/real/eval
    oprd sweep runs/real/student runs/real/teacher words --methods oprd --rates 3e-4 1e-3 2e-3 4e-3 \\
      --lora 32 --positions all --max_steps 30 --per_device_train_batch_size 16 \\
      --gradient_accumulation_steps 1 --num_generations 1 --max_completion_length 48 \\
      --lr_scheduler_type constant_with_warmup --warmup_steps 3 --adam_beta2 0.98 \\
      --test_limit 200 --samples 1 --save_strategy no --output_dir runs/real/oprd
    # the same with --methods opd-full --rates 1e-4 3e-4 1e-3 2e-3 --output_dir runs/real/opd-full
    # longer, at the rate that was chosen, with seeds 1, 2 and 3: 20 minutes per run on a quiet core
    oprd train runs/real/student runs/real/teacher --prompts words --test words --method oprd \\
      --learning_rate 4e-3 --seed 1 --lora 32 --positions all --max_steps 80 \\
      --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --num_generations 1 \\
      --max_completion_length 48 --lr_scheduler_type linear --warmup_steps 8 --adam_beta2 0.98 \\
      --sampler transformers --test_limit 200 --samples 1 --save_strategy no \\
      --output_dir runs/real/long/oprd-1
    python examples/real_pair.py store      # tables and curves into nbs/results/real

Student and teacher are two moments of one supervised fine-tuning of SmolLM2-135M-Instruct on written
solutions: the student after few steps, when it knows the format, the teacher after many. Then `oprd sweep`
distils the student (LoRA on all linear layers, float32 adapters on bfloat16 weights) on its own rollouts. No
number of the test and validation problems is seen in training.
"""

import argparse
import os

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import AutoConfig, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from oprd_nb.cli.arguments import quiet  # noqa: E402
from oprd_nb.core import set_seed  # noqa: E402
from oprd_nb.evaluation.sampling import Evaluation  # noqa: E402
from oprd_nb.models.loading import load_model, load_tokenizer  # noqa: E402
from oprd_nb.runs.folder import read_run  # noqa: E402
from oprd_nb.tasks.words import word_problems  # noqa: E402
from oprd_nb.utils import results_folder  # noqa: E402

STUDENT_STEPS = 20
TEACHER_STEPS = 180
METHODS = ("oprd", "opd-full")
CURVES = ["step", "seconds", "loss", "rollout/accuracy", "response_length/mean"]


class SaveAt(TrainerCallback):
    """Saves the model, in bfloat16, after these steps."""

    def __init__(self, folders: dict[int, Path], tokenizer):
        self.folders = folders
        self.tokenizer = tokenizer

    def on_step_end(self, args, state, control, model=None, **_):
        folder = self.folders.get(state.global_step)
        if folder is not None:
            weights = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
            model.save_pretrained(folder, state_dict=weights)
            # transformers reads the precision from here, and not from the tensors.
            stored = AutoConfig.from_pretrained(folder)
            stored.dtype = torch.bfloat16
            stored.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)


def make_pair(out: Path, student_steps: int, teacher_steps: int, batch: int = 16) -> None:
    """Fine-tune SmolLM2 on written solutions and keep two moments of it: `out`/student and `out`/teacher."""
    set_seed(0)
    tokenizer = load_tokenizer("smollm2")
    model = load_model("smollm2", train=True)
    problems = word_problems(train=teacher_steps * batch, seed=11).train

    def as_pair(row: dict) -> dict:
        return {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": row["solution"]}]}

    config = SFTConfig(
        str(out / "sft"),
        max_steps=teacher_steps,
        per_device_train_batch_size=batch,
        learning_rate=3e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=8,
        adam_beta2=0.98,
        completion_only_loss=True,
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=Dataset.from_list([as_pair(row) for row in problems]),
        processing_class=tokenizer,
        callbacks=[SaveAt({student_steps: out / "student", teacher_steps: out / "teacher"}, tokenizer)],
    )
    trainer.train()


def accuracy_row(role: str, folder: Path) -> dict:
    """The first metric of the evaluation of this model that `oprd eval` stored."""
    (path,) = folder.glob(f"*{role}*.parquet")
    return {"role": role} | Evaluation.load(path).summary.iloc[0].to_dict()


def long_rows(folder: Path) -> pd.DataFrame:
    """One row per run in `folder`: its settings, its accuracy and that of both models before it."""
    rows = []
    for path in sorted(folder.glob("*-*")):
        run = read_run(path)
        found = {
            when: Evaluation.load(path / "eval" / f"{when}.parquet")
            for when in ("before", "after", "teacher")
        }
        accuracy = {when: evaluation.samples["correct"].mean() for when, evaluation in found.items()}
        rows.append(
            {
                "method": run.method,
                "learning_rate": run.config["learning_rate"],
                "seed": run.config["seed"],
                "split": "test",
                "before": accuracy["before"],
                "accuracy": accuracy["after"],
                "teacher": accuracy["teacher"],
                "seconds": run.metrics["seconds"].iloc[-1],
                "steps": run.config["max_steps"],
            }
        )
    return pd.DataFrame(rows)


def curves_of(path: Path, method: str, seed: int) -> pd.DataFrame:
    """What a run logged per step, as far as it is stored."""
    return read_run(path).metrics[CURVES].assign(method=method, seed=seed)


def store(out: Path, folder: Path) -> None:
    """Write what was measured of models, sweeps and longer runs below `out` as tables into `folder`.

    What is not below `out` is left as it is in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    if (out / "long").is_dir():
        tables["long"] = long_rows(out / "long")
        rows = [(row.method, row.seed) for row in tables["long"].itertuples()]
        tables["long_curves"] = pd.concat(
            [curves_of(out / "long" / f"{method}-{seed}", method, seed) for method, seed in rows]
        )
    if all((out / method).is_dir() for method in METHODS):
        tables["pair"] = pd.DataFrame([accuracy_row(role, out / "eval") for role in ("student", "teacher")])
        tables["runs"] = pd.concat([pd.read_csv(out / method / "sweep.csv") for method in METHODS])
        tested = tables["runs"][tables["runs"]["split"] == "test"]
        tables["curves"] = pd.concat(
            [curves_of(out / row.method / row.run, row.method, row.seed) for row in tested.itertuples()]
        )
    for name, table in tables.items():
        table.to_csv(folder / f"{name}.csv", index=False, float_format="%.4g")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("pair")
    make.add_argument("--student_steps", type=int, default=STUDENT_STEPS)
    make.add_argument("--teacher_steps", type=int, default=TEACHER_STEPS)
    keep = commands.add_parser("store")
    keep.add_argument("--into", type=Path, default=results_folder() / "real")
    for command in (make, keep):
        command.add_argument("--out", type=Path, default=Path("runs/real"))
    args = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.command == "pair":
        args.out.mkdir(parents=True, exist_ok=True)
        make_pair(args.out, args.student_steps, args.teacher_steps)
    else:
        store(args.out, args.into)


if __name__ == "__main__":
    main()
