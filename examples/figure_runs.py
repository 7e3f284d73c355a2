"""The runs behind the gallery of figures, each one a command `oprd train`; small copies are kept.

    python examples/figure_runs.py --out nbs/results/figures

Four methods on the embedded pair of one architecture, bridges to the wider teacher and to the one with
another tokenizer (for as many steps as in their tutorials), and a sweep of mu: mu * OPRD added to the
sampled-token loss (Eq. 7), three seeds each. Methods train at the learning rates that
`oprd sweep` and `examples/bridge_runs.py` found best for them (top-k at full KL's); the sweep's
runs share one, as the paper's do. Every step is accumulated from 8 micro-batches, so that the signal in
its gradient is measured too.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from contextlib import chdir
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

import pandas as pd  # noqa: E402

ALL = (
    "--prompts arithmetic --test arithmetic --positions all --max_completion_length 40 --num_generations 1 "
    "--per_device_train_batch_size 8 --gradient_accumulation_steps 8 --weight_decay 0 --bf16 False "
    "--use_cpu True --gradient_checkpointing False --save_strategy no --disable_tqdm True"
).split()
PAIRS = {
    "same": "embedded/student embedded/teacher",
    "wide": "embedded/student embedded/teacher_wide",
    "tokens": "embedded/student embedded/teacher_tokens",
}
METHODS = {  # name: pair, settings
    "oprd": ("same", "--method oprd --learning_rate 3e-3"),
    "opd-full": ("same", "--method opd-full --learning_rate 3e-4"),
    "opd-topk": ("same", "--method opd-topk --learning_rate 3e-4"),
    "opd-sampled": ("same", "--method opd-sampled --learning_rate 1e-4"),
    "wide-bridge": ("wide", "--method bridge --learning_rate 3e-4 --max_steps 600"),
    "wide-readout": ("wide", "--method readout --learning_rate 3e-3 --max_steps 600"),
    "tokens-bridge": ("tokens", "--method bridge --rank 4 --learning_rate 1e-4 --max_steps 400"),
    "tokens-readout": ("tokens", "--method readout --learning_rate 3e-3 --max_steps 400"),
}
SWEEP = {
    f"mu-{mu:g}-seed-{seed}": ("same", f"--method opd-sampled --learning_rate 3e-4 --mu {mu:g} --seed {seed}")
    for mu in (0, 1, 10, 100)
    for seed in (1, 2, 3)
}


def keep(run: Path, out: Path, curves: bool) -> None:
    """Copy what figures read: settings, outcome, samples without their texts.

    With `curves`, also metrics to five digits.
    """
    (out / "eval").mkdir(parents=True, exist_ok=True)
    for name in ("config.yaml", "about.json", "summary.json"):
        (out / name).write_bytes((run / name).read_bytes())
    if curves:
        lines = [
            json.loads(line, parse_float=lambda digits: float(f"{float(digits):.5g}"))
            for line in (run / "metrics.jsonl").read_text().splitlines()
        ]
        (out / "metrics.jsonl").write_text(
            "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines)
        )
    for path in (run / "eval").glob("*.parquet"):
        pd.read_parquet(path, columns=["set", "problem", "correct", "tokens", "truncated"]).to_parquet(
            out / "eval" / path.name, compression="zstd"
        )


def one_run(name: str, steps: int, out: str) -> str:
    """Train once, and keep the small copy as `<out>/<name>`."""
    from oprd_nb.cli import main as oprd
    from oprd_nb.models.pairs import embedded

    pair, settings = (METHODS | SWEEP)[name]
    out = Path(out).absolute()
    with TemporaryDirectory() as folder, chdir(folder):
        student, teacher = PAIRS[pair].split()
        sys.argv = [
            "oprd",
            "train",
            "--student",
            student,
            "--teacher",
            teacher,
            *ALL,
            "--max_steps",
            str(steps),
            *settings.split(),
            "--output_dir",
            name,
        ]
        if name in METHODS:
            embedded("same").task.validation.select(range(100)).to_parquet("validation.parquet")
            sys.argv += [
                "--validation",
                "validation.parquet",
                "--eval_strategy",
                "steps",
                "--eval_steps",
                str(max(1, steps // 8)),
                "--eval_on_start",
                "True",
            ]
        if code := oprd():
            raise RuntimeError(f"{name}: `{' '.join(sys.argv)}` ended with {code}")
        keep(Path(name), out / name, curves=pair == "same" and name in METHODS)
    return name


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--names", nargs="+", default=[*METHODS, *SWEEP])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="runs/figures")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        for done in [pool.submit(one_run, name, args.steps, args.out) for name in args.names]:
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
