"""Runs a small training in forked processes that kill themselves, resumes it, and prints the outcome as JSON.

usage: killed_runs.py FOLDER KILL ...

KILL is PLACE:STEP, such as rollout:3, backward:1, optimizer:4; full:4 is a disk that fills up
"""

import json
import os
import resource
import signal
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import peft
import torch
import transformers
from peft import LoraConfig
from trl import DistillationTrainer

import oprd_nb.training.trainer
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.terms import as_objective
from oprd_nb.teachers import Teacher
from oprd_nb.training.checkpoints import checkpoint_problem, checkpoints_of
from oprd_nb.training.config import OPRDConfig
from oprd_nb.training.trainer import OPRDTrainer
from oprd_nb.utils import read_jsonl

STEPS, SAVED_EVERY = 6, 2
PASSING = ("time/", "memory/", "seconds", "step_time")
"""Metrics that differ from run to run."""


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm_model(trainer, place: str, step: int) -> None:
    """Die in generation, or in the backward pass of the second micro-batch, of optimizer step `step`."""
    calls = {"n": 0}

    def count(*_):
        calls["n"] += trainer.state.global_step == step - 1
        if calls["n"] == {"rollout": 7, "backward": 2}[place]:
            die()

    if place == "rollout":
        trainer.model.get_output_embeddings().register_forward_hook(
            count
        )  # training reads the head's weight, generation calls the head
    else:
        trained = [p for p in trainer.model.parameters() if p.requires_grad]
        trained[len(trained) // 2].register_hook(count)


def arm_file(trainer, place: str, step: int) -> None:
    """Die while one file of checkpoint-`step` is written, or between its last file and its manifest."""

    def torn(write, name=""):
        """`write(_, path)`; a file called `name` of this step is cut in half before death."""

        def call(content, path, *args, **options):
            write(content, path, *args, **options)
            if trainer.state.global_step == step and str(path).endswith(name):
                os.truncate(path, os.path.getsize(path) // 2)
                die()

        return call

    if place == "weights":
        for module in (transformers.modeling_utils, peft.peft_model):
            module.safe_save_file = torn(module.safe_save_file)
    elif place == "optimizer":
        torch.save = torn(torch.save, "optimizer.pt")
    elif place == "state":
        transformers.TrainerState.save_to_json = torn(transformers.TrainerState.save_to_json)
    elif place == "full":
        write = DistillationTrainer._save_checkpoint

        def filling(self, *args):
            if (
                self.state.global_step == step
            ):  # no file may grow beyond a third of the weights: what a full disk does to them
                resource.setrlimit(resource.RLIMIT_FSIZE, (600_000, resource.RLIM_INFINITY))
            return write(self, *args)

        DistillationTrainer._save_checkpoint = filling
    else:
        write = oprd_nb.training.trainer.write_manifest
        oprd_nb.training.trainer.write_manifest = lambda folder: (
            die() if trainer.state.global_step == step else write(folder)
        )


def run(folder: Path, kill: str | None = None, resume: bool = False, lora: bool = False) -> None:
    """Six steps over two epochs of twelve prompts, two responses each; a checkpoint every second step.

    Each step has two micro-batches.

    With `lora` the objective stops at layer 2: the adapters above it are frozen, and must be after loading.
    """
    torch.set_num_threads(1)
    pair = embedded("same")
    args = OPRDConfig(
        str(folder),
        learning_rate=1e-3,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=2,
        max_completion_length=24,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="steps",
        save_steps=SAVED_EVERY,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=SAVED_EVERY,
        eval_on_start=True,
        disable_tqdm=True,
        use_cpu=True,
        report_to="none",
    )
    trainer = OPRDTrainer(
        model=pair.student,
        teacher=Teacher(pair.teacher, pair.tokenizer),
        args=args,
        objective=as_objective(Representation("2")) if lora else FullKL() + Representation("2"),
        train_dataset=pair.task.train.select(range(12)),
        eval_dataset=pair.task.validation.select(range(8)),
        processing_class=pair.tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    if kill:
        place, step = kill.split(":")
        (arm_model if place in ("rollout", "backward") else arm_file)(trainer, place, int(step))
    trainer.train(resume_from_checkpoint=resume)
    torch.save({name: p.detach() for name, p in trainer.model.named_parameters()}, folder / "final.pt")
    (folder / "resumed_from").write_text(str(trainer._initial_global_step))


def forked(**options) -> int:
    """`run` in a process of its own; its exit status, negative for the signal that ended it."""
    child = os.fork()
    if not child:
        try:
            warnings.simplefilter("ignore")
            run(**options)
            os._exit(0)
        except BaseException as error:
            print(f"{options}: {error!r}", file=sys.stderr, flush=True)
            (options["folder"] / "error").write_text(str(error))
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lasting(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl without what differs from run to run."""
    return [
        {name: value for name, value in line.items() if not name.startswith(PASSING)}
        for line in read_jsonl(folder / "metrics.jsonl")
    ]


def main(out: Path, kills: list[str]) -> dict:
    """For every kill: how the run ended, the state of its checkpoints, and what the resumed run did.

    The resumed run is compared with one that was never interrupted.
    """
    results = {}
    for lora in sorted({kill.startswith("lora-") for kill in kills}):
        whole = out / f"whole-{lora}"
        status = {
            "again": forked(folder=whole, lora=lora),
            "after the end": forked(folder=whole, lora=lora, resume=True),
        }
        wanted, lines = torch.load(whole / "final.pt"), lasting(whole)
        for kill in (kill for kill in kills if kill.startswith("lora-") == lora):
            folder = out / kill.replace(":", "-")
            died = forked(folder=folder, kill=kill.removeprefix("lora-"), lora=lora)
            said = (folder / "error").read_text() if (folder / "error").exists() else ""
            left = {path.name: checkpoint_problem(path) for path in checkpoints_of(folder)}
            resumed = forked(folder=folder, resume=True, lora=lora)
            final = torch.load(folder / "final.pt")
            results[kill] = {
                "whole": status,
                "died": died,
                "said": said,
                "left": left,
                "resumed": resumed,
                "from": int((folder / "resumed_from").read_text()),
                "apart": max((final[name] - wanted[name]).abs().max().item() for name in wanted),
                "bitwise": all(final[n].equal(wanted[n]) for n in wanted),
                "metrics": lasting(folder) == lines,
                "lines": len(lines),
                "checkpoints": [checkpoint_problem(path) for path in checkpoints_of(folder)],
            }
    return results


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
