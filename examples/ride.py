"""Targets beyond the teacher on the embedded pair: accuracy by strength, and the controls of RIDE.

    python examples/ride.py --steps 100 --out nbs/results/ride

The base is the student's initial weights. Every strength and control runs on the same grid of learning
rates; each one's best rate is chosen on the validation split with seed 0, and the numbers to quote come from
the test split with seeds 1 to 3. `<out>_sweep.csv` and `<out>_final.csv` hold one row per run: target,
strength, learning_rate, seed, steps, split, before, accuracy, seconds. Rows that are there are not run again.
"""

import argparse
import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

import pandas as pd  # noqa: E402

RATES = [3e-4, 1e-3, 3e-3, 1e-2]
STRENGTHS = [0.5, 0.75, 1.0, 1.15, 1.25, 1.35, 1.5, 2.0]
KEYS = ["target", "strength", "learning_rate", "seed", "steps", "split"]
CONTROLS = ["reversed", "random", "shuffled", "other base"]


def one_run(target: str, strength: float, learning_rate: float, seed: int, steps: int, split: str) -> dict:
    """Train once and measure the student before and after on `split`."""
    from oprd_nb.cli.arguments import quiet
    from oprd_nb.cli.demo import embedded_config
    from oprd_nb.cli.train import accuracy_of
    from oprd_nb.core import set_seed
    from oprd_nb.extrapolation import Extrapolated
    from oprd_nb.models.pairs import embedded
    from oprd_nb.objectives.representation import Representation
    from oprd_nb.tasks.problems import Task
    from oprd_nb.teachers import Teacher
    from oprd_nb.training.experiment import distil_pair

    quiet()
    pair = embedded("same")
    pair.task = Task(pair.task.name, train=pair.task.train, test=getattr(pair.task, split))
    base = embedded("same").student
    if target == "other base":
        # A model of the same shape that the teacher was not trained from.
        set_seed(seed)
        base = type(base)(base.config)
    teacher = Extrapolated(
        Teacher(pair.teacher, pair.tokenizer),
        Teacher(base, pair.tokenizer),
        strength,
        direction=target if target in ("reversed", "random", "shuffled") else "base",
        seed=seed,
    )
    with TemporaryDirectory() as folder:
        config = embedded_config(Path(folder), learning_rate, steps, seed, eval_steps=steps)
        config.eval_strategy = "no"
        config.eval_on_start = False
        config.disable_tqdm = True
        settings = {"method": "ride"}
        results = distil_pair(pair, Representation(), config, settings, held_out=500, teacher=teacher)
        seconds = pd.read_json(f"{folder}/metrics.jsonl", lines=True)["seconds"].max()
    row = dict(target=target, strength=strength, learning_rate=learning_rate, seed=seed)
    row |= dict(steps=steps, split=split, before=accuracy_of(results["before"]))
    row |= dict(accuracy=accuracy_of(results["after"]), seconds=float(seconds))
    print(row, flush=True)
    return row


def run_all(jobs: list[tuple], path: str) -> pd.DataFrame:
    """The rows of `jobs`, of which those stored at `path` are read and the others are run and stored."""
    rows = pd.read_csv(path).to_dict("records") if Path(path).exists() else []
    for job in jobs:
        if not any(tuple(row[key] for key in KEYS) == job for row in rows):
            rows.append(one_run(*job))
            pd.DataFrame(rows).to_csv(path, index=False, float_format="%.4g")
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out", default="nbs/results/ride")
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    targets = [("base", strength) for strength in STRENGTHS] + [(control, 1.25) for control in CONTROLS]
    jobs = [(*target, rate, 0, args.steps, "validation") for target in targets for rate in RATES]
    sweep = run_all(jobs, f"{args.out}_sweep.csv")
    best = sweep.loc[sweep.groupby(["target", "strength"]).accuracy.idxmax()]
    jobs = [
        (row.target, row.strength, row.learning_rate, seed, args.steps, "test")
        for row in best.itertuples()
        for seed in args.seeds
    ]
    final = run_all(jobs, f"{args.out}_final.csv")
    # Rows of rates that are no longer the best, since the grid has grown, are left out.
    chosen = pd.DataFrame(jobs, columns=KEYS)
    final.merge(chosen).to_csv(f"{args.out}_final.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
