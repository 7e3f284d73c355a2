"""A real language model gets better: SmolLM2-135M on word problems, one method at a time.

    make smollm2
    python examples/real_pair.py pair                          # student and teacher, once: about 15 minutes
    python examples/real_pair.py run oprd 1e-3 --seed 0 --split validation
    python examples/real_pair.py sweep --methods oprd full     # all rates with seed 0, then seeds 1 to 3

Student and teacher are two moments of one supervised fine-tuning of SmolLM2-135M-Instruct on written
solutions: the student after few steps, when it knows the format, the teacher after many. Then the student
(LoRA on all linear layers, float32 adapters on bfloat16 weights) is distilled on its own rollouts. No number
of the test and validation problems is seen in training. The rates of `sweep` are chosen on the validation
split with seed 0; the table to quote is that of the test split. `<out>/runs.csv` holds one row per run; rows
that are there are not run again.
"""

import argparse
import os

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

import warnings  # noqa: E402
from pathlib import Path  # noqa: E402

import pandas as pd  # noqa: E402
import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

from oprd_nb.cli.arguments import quiet  # noqa: E402
from oprd_nb.cli.train import accuracy_of  # noqa: E402
from oprd_nb.core import set_seed  # noqa: E402
from oprd_nb.evaluation.sampling import evaluate  # noqa: E402
from oprd_nb.models.loading import load_model, load_tokenizer  # noqa: E402
from oprd_nb.models.pairs import ModelPair  # noqa: E402
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL, TopKKL  # noqa: E402
from oprd_nb.objectives.representation import Representation  # noqa: E402
from oprd_nb.objectives.terms import Objective, as_objective  # noqa: E402
from oprd_nb.rollouts.samplers import HFSampler  # noqa: E402
from oprd_nb.tasks.problems import Task  # noqa: E402
from oprd_nb.tasks.words import word_problems  # noqa: E402
from oprd_nb.training.config import OPRDConfig  # noqa: E402
from oprd_nb.training.experiment import distil_pair  # noqa: E402

STUDENT_STEPS = 20
TEACHER_STEPS = 180
RATES = [3e-4, 1e-3, 2e-3, 1e-4]
MEASURED = {"validation": 128, "test": 256}
MAX_NEW_TOKENS = 48
OBJECTIVES = {
    "oprd": lambda: Representation(positions="all"),
    "oprd-last": lambda: Representation("last", "all", predicting=True),
    "full": FullKL,
    "topk": lambda: TopKKL(16, renormalize=False),
    "sampled": SampledTokenKL,
    "mixed": lambda: SampledTokenKL() + 10 * Representation(positions="all"),
}


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


def measured_problems(split: str) -> Dataset:
    """The problems on which models are measured; no training sees their numbers."""
    return getattr(word_problems(**MEASURED), split)


def measure_pair(out: Path) -> None:
    """The accuracies of student and teacher on the test problems, into `out`/pair.csv, once."""
    path = out / "pair.csv"
    if path.exists():
        return
    rows = []
    for role in ("student", "teacher"):
        sampler = HFSampler(load_model(out / role), load_tokenizer(out / role))
        result = evaluate(sampler, measured_problems("test"), n=1, max_new_tokens=MAX_NEW_TOKENS)
        rows.append({"role": role} | result.summary.iloc[0].to_dict())
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.4g")


def run(
    out: Path, method: str, learning_rate: float, seed: int, split: str, steps: int, batch: int, full: bool
) -> dict:
    """Distil once, and measure the student before and after on problems of `split` (`MEASURED`)."""
    set_seed(seed)
    lora = None if full else LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")
    student = load_model(out / "student", lora, train=True)
    tokenizer = load_tokenizer(out / "student")
    teacher = load_model(out / "teacher")
    # The problems that are measured are the same for every seed and method; those trained on are not.
    problems = word_problems(train=steps * batch, seed=seed)
    task = Task("words", problems.train, measured_problems(split), max_new_tokens=MAX_NEW_TOKENS)
    name = "-".join(
        [method, f"{learning_rate:.0e}", f"seed{seed}", split] + (["full-weights"] if full else [])
    )
    config = OPRDConfig(
        str(out / "runs" / name),
        max_steps=steps,
        learning_rate=learning_rate,
        seed=seed,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        num_generations=1,
        max_completion_length=MAX_NEW_TOKENS,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        adam_beta2=0.98,
        weight_decay=0.0,
        bf16=full,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
    )
    objective: Objective = as_objective(OBJECTIVES[method]())
    command = f"python examples/real_pair.py run {method} {learning_rate:g} --seed {seed} --split {split}"
    command += f" --steps {steps} --batch {batch}" + (" --full" if full else "")
    results = distil_pair(
        ModelPair(student, teacher, tokenizer, tokenizer, task),
        objective,
        config,
        {"method": method},
        {"command": command},
        held_out=MEASURED[split],
        samples=1,
    )
    log = pd.read_json(out / "runs" / name / "metrics.jsonl", lines=True)
    row = dict(method=method, learning_rate=learning_rate, seed=seed, split=split, full=full, steps=steps)
    row |= dict(before=accuracy_of(results["before"]), accuracy=accuracy_of(results["after"]))
    row |= dict(responses=steps * batch, tokens=int(log["num_tokens"].max()))
    row |= dict(seconds=float(log["seconds"].max()))
    print(row, flush=True)
    return row


def stored(path: Path) -> list[dict]:
    """The rows of runs that are done."""
    return pd.read_csv(path).to_dict("records") if path.exists() else []


def run_once(args: argparse.Namespace, method: str, learning_rate: float, seed: int, split: str) -> None:
    """`run`, unless its row is stored already; then store its row."""
    path = args.out / "runs.csv"
    key = dict(method=method, learning_rate=learning_rate, seed=seed, split=split, full=args.full)
    key["steps"] = args.steps
    rows = stored(path)
    if any(all(row[name] == value for name, value in key.items()) for row in rows):
        return
    rows.append(run(args.out, method, learning_rate, seed, split, args.steps, args.batch, args.full))
    pd.DataFrame(rows).to_csv(path, index=False, float_format="%.4g")


def sweep(args: argparse.Namespace) -> None:
    """Every rate of every method with seed 0 on the validation split, then the best with the other seeds."""
    measure_pair(args.out)
    for method in args.methods:
        for rate in RATES:
            run_once(args, method, rate, 0, "validation")
    table = pd.DataFrame(stored(args.out / "runs.csv"))
    table = table[(table.split == "validation") & (table.full == args.full) & (table.steps == args.steps)]
    for seed in args.seeds:
        for method in args.methods:
            own = table[table.method == method]
            run_once(args, method, own.loc[own.accuracy.idxmax(), "learning_rate"], seed, "test")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("pair")
    make.add_argument("--student_steps", type=int, default=STUDENT_STEPS)
    make.add_argument("--teacher_steps", type=int, default=TEACHER_STEPS)
    one = commands.add_parser("run")
    one.add_argument("method", choices=list(OBJECTIVES))
    one.add_argument("learning_rate", type=float)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--split", choices=["validation", "test"], default="test")
    many = commands.add_parser("sweep")
    many.add_argument("--methods", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    many.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    for command in (one, many):
        command.add_argument("--steps", type=int, default=40)
        command.add_argument("--batch", type=int, default=16)
        command.add_argument("--full", action="store_true", help="train all weights and not LoRA adapters")
    for command in (make, one, many):
        command.add_argument("--out", type=Path, default=Path("runs/real"))
    args = parser.parse_args()
    quiet()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    if args.command == "pair":
        make_pair(args.out, args.student_steps, args.teacher_steps)
    elif args.command == "run":
        run_once(args, args.method, args.learning_rate, args.seed, args.split)
    else:
        sweep(args)


if __name__ == "__main__":
    main()
