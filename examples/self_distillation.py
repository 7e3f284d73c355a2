"""A real model as its own teacher: SmolLM2-135M-Instruct with LoRA; the teacher is told the solution.

    make smollm2
    python examples/self_distillation.py --out runs/self-distillation

Sums of two numbers from 2 to 20, asked with four worked examples, of which the model gets about one in
four right. The teacher is the student's own base, adapters off (`Teacher.of_base`: one set of weights
in memory), asked the same with every sum told in advance. OPRD on all layers and response positions.
Problems of the three splits are disjoint, whichever way round they are written. The run folder holds
the accuracy on test problems before and after, with intervals, and that of the base when it is told the
sum.
"""

import argparse
import random
import re
from itertools import combinations_with_replacement

from datasets import Dataset
from peft import LoraConfig

from oprd_nb.cli.arguments import quiet
from oprd_nb.cli.train import accuracy_of
from oprd_nb.core import set_seed
from oprd_nb.evaluation.sampling import evaluate
from oprd_nb.models.loading import load_model, load_tokenizer
from oprd_nb.models.pairs import ModelPair
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.terms import as_objective
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.tasks.problems import Task
from oprd_nb.teachers import Teacher, without_adapters
from oprd_nb.training.config import OPRDConfig
from oprd_nb.training.experiment import distil_pair

EXAMPLES = ((3, 9), (14, 5), (8, 8), (11, 17))


def chat(a: int, b: int) -> list[dict]:
    """Four worked examples and one open question."""

    def asked(x, y):
        return {"role": "user", "content": f"What is {x} + {y}? Put the answer in \\boxed{{}}."}

    return [
        m
        for x, y in EXAMPLES
        for m in (asked(x, y), {"role": "assistant", "content": f"{x} + {y} = \\boxed{{{x + y}}}."})
    ] + [asked(a, b)]


def told(messages: list[dict]) -> list[dict]:
    """The same messages, each question with its sum."""

    def with_sum(message):
        x, y = map(int, re.search(r"(\d+) \+ (\d+)", message["content"]).groups())
        return message | {"content": f"{x} + {y} is {x + y}. {message['content']}"}

    return [with_sum(m) if m["role"] == "user" else m for m in messages]


def sums(test: int = 60, seed: int = 0) -> Task:
    """All pairs from 2 to 20 that are not worked examples, each in both orders.

    `test` pairs are for the report, the rest to train on.
    """
    pairs = [
        p
        for p in combinations_with_replacement(range(2, 21), 2)
        if p not in {tuple(sorted(e)) for e in EXAMPLES}
    ]
    random.Random(seed).shuffle(pairs)

    def rows(chosen):
        both = [q for a, b in chosen for q in sorted({(a, b), (b, a)})]
        return Dataset.from_dict(
            {"prompt": [chat(a, b) for a, b in both], "answer": [str(a + b) for a, b in both]}
        )

    return Task("sums", train=rows(pairs[test:]), test=rows(pairs[:test]))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--samples", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="runs/self-distillation")
    args = parser.parse_args()
    quiet()
    set_seed(args.seed)
    student, tokenizer = (
        load_model(
            args.model,
            LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear"),
            dtype="bfloat16",
            device="cpu",
            train=True,
        ),
        load_tokenizer(args.model),
    )
    pair = ModelPair(student, student, tokenizer, tokenizer, sums())
    config = OPRDConfig(
        args.out,
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        seed=args.seed,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=1,
        num_generations=1,
        max_completion_length=32,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        gradient_checkpointing=False,
        weight_decay=0.0,
    )
    settings = {"method": "oprd", "student": args.model, "teacher": f"{args.model}, told the sum"}
    about = {
        "label": "OPRD, told the sum",
        "task": "sums",
        "command": f"python examples/self_distillation.py --steps {args.steps} --samples {args.samples}",
    }
    results = distil_pair(
        pair,
        as_objective(Representation(positions="all")),
        config,
        settings,
        about,
        held_out=len(pair.task.test),
        samples=args.samples,
        teacher=Teacher.of_base(student, tokenizer, prompt=told),
    )
    told_all = Task(
        "sums", train=None, test=pair.task.test.map(lambda problem: {"prompt": told(problem["prompt"])})
    )
    with without_adapters(student):
        results["teacher"] = evaluate(
            HFSampler(student, tokenizer),
            told_all,
            n=args.samples,
            temperature=config.eval_temperature,
            max_new_tokens=config.max_completion_length,
            seed=args.seed,
            path=f"{args.out}/eval/teacher.parquet",
        )
    for when, result in results.items():
        print(f"{when}: {accuracy_of(result):.1%}")
        print(result.summary.to_string())


if __name__ == "__main__":
    main()
