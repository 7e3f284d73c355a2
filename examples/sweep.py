"""Find each method's best learning rate on held-out problems, then measure it on others with fresh seeds.

    python examples/sweep.py --pair same --steps 200 --workers 2 --out nbs/results/same

Every method runs on the same grid of learning rates; where its best is on the edge of the grid, the
grid grows beyond that edge. The choice is made on the validation split with seed 0; the numbers to
quote come from the test split with seeds 1 to 3. Two tables are written: `<out>_sweep.csv` (method,
learning_rate, accuracy) and `<out>_final.csv` (method, learning_rate, seed, accuracy, before, seconds).
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

import pandas as pd  # noqa: E402

LADDER = [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
GRID = LADDER[4:9]


def one_run(pair_name: str, method: str, learning_rate: float, seed: int, steps: int, split: str) -> dict:
    """Train once and measure the student before and after on `split`."""
    from oprd_nb.cli.arguments import quiet
    from oprd_nb.cli.demo import embedded_config, embedded_objective
    from oprd_nb.cli.train import accuracy_of
    from oprd_nb.models.pairs import embedded
    from oprd_nb.tasks.problems import Task
    from oprd_nb.training.experiment import distil

    quiet()
    pair = embedded(pair_name)
    pair.task = Task(pair.task.name, train=pair.task.train, test=getattr(pair.task, split))
    with TemporaryDirectory() as folder:
        config = embedded_config(Path(folder), learning_rate, steps, seed, eval_steps=steps)
        config.eval_strategy, config.eval_on_start, config.disable_tqdm = "no", False, True
        results = distil(pair, embedded_objective(method), config, {"method": method}, held_out=500)
        seconds = pd.read_json(f"{folder}/metrics.jsonl", lines=True)["seconds"].max()
    row = dict(
        pair=pair_name,
        method=method,
        learning_rate=learning_rate,
        seed=seed,
        steps=steps,
        split=split,
        before=accuracy_of(results["before"]),
        accuracy=accuracy_of(results["after"]),
        seconds=seconds,
    )
    print(
        "{method:12} lr {learning_rate:.0e} seed {seed} {split}: "
        "{before:.1%} -> {accuracy:.1%} in {seconds:.0f} s".format(**row),
        flush=True,
    )
    return row


def beyond_edge(rows: pd.DataFrame) -> float | None:
    """The learning rate to try next where the best one lies on the grid's edge, else None."""
    best = rows.sort_values("accuracy").learning_rate.iloc[-1]
    rung = LADDER.index(best)
    if best == rows.learning_rate.max():
        return LADDER[rung + 1]
    return LADDER[rung - 1] if best == rows.learning_rate.min() else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default="same")
    parser.add_argument("--methods", nargs="+", default=["oprd", "opd-full", "opd-sampled"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="nbs/results/same")
    args = parser.parse_args()
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        jobs = [(method, rate) for method in args.methods for rate in GRID]
        rows = []
        while jobs:
            rows += pool.map(
                one_run,
                *zip(*[(args.pair, m, lr, 0, args.steps, "validation") for m, lr in jobs], strict=True),
            )
            sweep = pd.DataFrame(rows).sort_values(["method", "learning_rate"])
            sweep.to_csv(f"{args.out}_sweep.csv", index=False, float_format="%.4g")
            jobs = [(m, lr) for m, table in sweep.groupby("method") if (lr := beyond_edge(table)) is not None]
        best = sweep.loc[sweep.groupby("method").accuracy.idxmax(), ["method", "learning_rate"]]
        final = [
            (args.pair, m, lr, seed, args.steps, "test")
            for m, lr in best.itertuples(index=False)
            for seed in args.seeds
        ]
        pd.DataFrame(pool.map(one_run, *zip(*final, strict=True))).to_csv(
            f"{args.out}_final.csv", index=False, float_format="%.4g"
        )


if __name__ == "__main__":
    main()
