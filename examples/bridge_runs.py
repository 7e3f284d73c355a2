"""Both bridges beside output-space distillation, on an embedded pair: learning rates by sweep, numbers with seeds.

    python examples/bridge_runs.py --pair cross_architecture --steps 600 --out nbs/results/cross_architecture
    python examples/bridge_runs.py --pair cross_tokenizer --steps 900 --out nbs/results/cross_tokenizer

The rules are those of `sweep.py`: every method on the same grid of learning rates, the grid grows where its best lies on the edge, the choice is made on the validation
split with seed 0, and the numbers to quote come from the test split with other seeds. A bridge is fitted anew in every run, from that run's seed. `a>b` trains
with a for half of the steps and goes on from there with b, each at its own best learning rate; a bridge in second place is fitted to the student as it then is.

Four tables: `<out>_sweep.csv` and `<out>_final.csv` (method, learning_rate, seed, before, accuracy, seconds, coverage), `<out>_bridges.csv` (held-out scores of every
bridge of the final runs) and `<out>_coverage.csv` (share of the student's tokens by byte offset into the teacher's next token).
"""
import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

import pandas as pd  # noqa: E402
from sweep import GRID, beyond_edge  # noqa: E402

METHODS = {
    "cross_architecture": ["opd-full", "opd-sampled", "bridge-4", "bridge-8", "bridge-32", "bridge-auto", "readout", "readout-free",
                           "bridge-8>opd-sampled", "opd-sampled>bridge-8", "bridge-8>opd-full", "opd-full>bridge-8"],
    "cross_tokenizer": ["bridge-4", "bridge-4-ids", "opd-sampled-ids", "readout", "readout-free", "readout-boundaries"],
}
"""`-ids` is the reference's way across tokenizers: the teacher is fed the student's ids. `-free` lets a readout choose the length of its states; `-boundaries`
supervises shared byte boundaries only."""
FITTING_PROMPTS = 1024


def bridge_for(method: str, pair, seed: int):
    """The bridge a method needs, fitted to the student as it is now; None for a method without one."""
    from dataclasses import replace

    from oprd_nb.bridge import ReadoutBridge, fit_bridge, fit_readout, retokenized
    from oprd_nb.pairing import fingerprint
    from oprd_nb.rollouts import HFSampler
    from oprd_nb.teachers import Teacher

    kind, *options = method.split("-")
    if kind == "opd":
        return None
    teacher, prompts = Teacher(pair.teacher, pair.teacher_tokenizer), pair.task.train["prompt"][:FITTING_PROMPTS]
    sampling = {"max_new_tokens": 40, "seed": seed}
    if kind == "bridge":
        rollouts = HFSampler(pair.student, pair.tokenizer).sample(prompts, **sampling)
        rank = options[0] if options[0] == "auto" else int(options[0])
        return fit_bridge(pair.student, teacher, rollouts, pair.tokenizer, rank, positions="all")
    if fingerprint(pair.tokenizer) == fingerprint(pair.teacher_tokenizer):
        rollouts = HFSampler(pair.student, pair.tokenizer).sample(prompts, **sampling)
    else:
        rollouts = retokenized(HFSampler(pair.teacher, pair.teacher_tokenizer).sample(prompts, **sampling), pair.teacher_tokenizer, pair.tokenizer)
    readout = fit_readout(pair.student, teacher, rollouts, pair.tokenizer, at_length="free" not in options)
    if "boundaries" not in options:
        return readout
    return ReadoutBridge(replace(readout.header, offsets=(0,), scores=readout.header.scores[:1]), {name: tensor[:1] for name, tensor in readout.tensors.items()})


def objective_for(method: str, bridge):
    """The objective of one stage."""
    from oprd_nb.cli import METHODS as PLAIN
    from oprd_nb.objectives import Representation, as_objective

    if bridge is None:
        return PLAIN[method.removesuffix("-ids")]()
    if method.startswith("bridge"):
        return as_objective(Representation(positions="all", bridge=bridge))
    return as_objective(Representation(layers="last", positions="all", predicting=True, bridge=bridge))


def one_run(pair_name: str, method: str, rates: list[float], seed: int, steps: int, split: str) -> tuple[dict, list[dict]]:
    """Train once, stage by stage, and measure the student before and after on `split`; a row, and the held-out scores of every bridge."""
    from oprd_nb.cli import accuracy_of, distil, embedded_config, quiet
    from oprd_nb.models import embedded
    from oprd_nb.tasks import Task

    quiet()
    pair, stages, rows = embedded(pair_name), method.split(">"), []
    pair.task = Task(pair.task.name, train=pair.task.train, test=getattr(pair.task, split))
    if method.endswith("-ids"):
        pair.teacher_tokenizer = pair.tokenizer
    results, seconds, coverage = [], 0.0, 1.0
    for i, (stage, rate) in enumerate(zip(stages, rates, strict=True)):
        bridge = bridge_for(stage, pair, seed)
        if bridge is not None:
            kept = bridge.scores if "rank" not in bridge.scores else bridge.scores[bridge.scores["rank"] == bridge.rank]
            rows += kept.assign(method=method, seed=seed, stage=i, fitted_rows=bridge.header.rows, fitted_coverage=bridge.header.coverage).to_dict("records")
        pair.student.requires_grad_(True)
        with TemporaryDirectory() as folder:
            config = embedded_config(Path(folder), rate, steps // len(stages), seed + 1000 * i, eval_steps=steps)
            config.eval_strategy, config.eval_on_start, config.disable_tqdm = "no", False, True
            results.append(distil(pair, objective_for(stage, bridge), config, {"method": method}, held_out=500))
            metrics = pd.read_json(f"{folder}/metrics.jsonl", lines=True)
        seconds, coverage = seconds + metrics["seconds"].max(), metrics["pairing/coverage"].mean()
    row = dict(pair=pair_name, method=method, learning_rate=rates[0], later_rate=rates[-1], seed=seed, steps=steps, split=split, before=accuracy_of(results[0]["before"]),
               accuracy=accuracy_of(results[-1]["after"]), seconds=seconds, coverage=coverage)
    print("{method:22} lr {learning_rate:.0e} seed {seed} {split}: {before:.1%} -> {accuracy:.1%} in {seconds:.0f} s".format(**row), flush=True)
    return row, rows


def coverage_table(pair_name: str, prompts: int = 1024) -> pd.DataFrame:
    """Share of the student's tokens at each byte offset, and without a teacher row, on its own rollouts."""
    from oprd_nb.models import embedded
    from oprd_nb.rollouts import HFSampler
    from oprd_nb.teachers import Teacher

    pair = embedded(pair_name)
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(pair.task.train["prompt"][:prompts], max_new_tokens=40)
    pairs = Teacher(pair.teacher, pair.teacher_tokenizer).read(rollouts, pair.tokenizer)
    shares = pairs.coverage_by_offset() | {"none": 1 - pairs.coverage}
    return pd.DataFrame({"pair": pair_name, "offset": list(shares), "share": list(shares.values())})


def sweep(pool, args, methods: list[str]) -> pd.DataFrame:
    """Validation accuracy of every single-stage method on the grid, grown where its best lies on the edge."""
    jobs, rows = [(method, rate) for method in methods for rate in GRID], []
    while jobs:
        rows += [row for row, _ in pool.map(one_run, *zip(*[(args.pair, m, [lr], 0, args.steps, "validation") for m, lr in jobs], strict=True))]
        table = pd.DataFrame(rows).sort_values(["method", "learning_rate"])
        table.to_csv(f"{args.out}_sweep.csv", index=False, float_format="%.4g")
        jobs = [(m, lr) for m, part in table.groupby("method") if args.grow and (lr := beyond_edge(part)) is not None]
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pair", default="cross_architecture", choices=METHODS)
    parser.add_argument("--methods", nargs="+", help="by default all of the pair; the parts of a>b are swept too")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="nbs/results/cross_architecture")
    parser.add_argument("--rates", type=float, nargs="+", help="this grid in place of the sweep's, and do not grow it")
    args = parser.parse_args()
    args.grow = args.rates is None
    GRID[:] = args.rates or GRID
    methods = args.methods or METHODS[args.pair]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    coverage_table(args.pair).to_csv(f"{args.out}_coverage.csv", index=False, float_format="%.4g")
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        table = sweep(pool, args, list(dict.fromkeys(stage for method in methods for stage in method.split(">"))))
        best = table.loc[table.groupby("method").accuracy.idxmax()].set_index("method").learning_rate
        final = [(args.pair, m, [float(best[stage]) for stage in m.split(">")], seed, args.steps, "test") for m in methods for seed in args.seeds]
        rows, bridges = zip(*pool.map(one_run, *zip(*final, strict=True)), strict=True)
    pd.DataFrame(rows).to_csv(f"{args.out}_final.csv", index=False, float_format="%.4g")
    pd.DataFrame([record for records in bridges for record in records]).to_csv(f"{args.out}_bridges.csv", index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
