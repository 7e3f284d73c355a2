"""Both bridges and output-space distillation, on an embedded pair: rates by sweep, numbers with seeds.

    python examples/bridge_runs.py --pair cross_architecture --out nbs/results/cross_architecture
    python examples/bridge_runs.py --pair cross_tokenizer --steps 400 --out nbs/results/cross_tokenizer

The rules are those of `oprd sweep`: every method on the same grid of learning rates, the grid grows where
its best is on the edge, the choice is made on the validation split with seed 0, and the numbers to
quote come from the test split with other seeds. The paper's bridge is swept at rank 8 only and in a
third of the steps, and its rate serves every rank. A bridge is fitted anew in every run, from that
run's seed. `a>b` trains with a for half of the steps and goes on from there with b, each at its own
best learning rate; a bridge in second place is fitted to the student as it then is. `a>head` trains with a,
and then calibrates the LM head on 1,024 responses, which take the place of the last steps.

Three tables: `<out>_sweep.csv` and `<out>_final.csv` (method, learning_rate, seed, before, accuracy,
coverage, the bridge's own held-out scores), and `<out>_coverage.csv` (share of the student's tokens by
byte offset into the teacher's next token). Rows are added as runs end; what a table already holds is
not run again. A student that comes to write what the teacher cannot read counts as 0.
"""

import argparse
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}

import pandas as pd  # noqa: E402

METHODS = {
    "cross_architecture": [
        "opd-full",
        "readout",
        "bridge-8",
        "bridge-8>opd-full",
        "opd-full>bridge-8",
        "bridge-8>head",
        "bridge-32>head",
        "bridge-auto",
        "bridge-32",
        "bridge-4",
        "readout-directions",
    ],
    "cross_tokenizer": ["readout-every", "readout-boundaries-every", "bridge-4-ids"],
}
"""What the endings of a method's name mean.

`-directions` compares unit vectors in place of states with their length.
`-boundaries` supervises shared byte boundaries only.
`-every` supervises positions after every token of the teacher, those that its text never had too.
`-ids` is the reference's way across tokenizers: the teacher is fed the student's ids.
"""
KEY = ["method", "learning_rate", "later_rate", "seed", "steps", "split"]


LADDER = [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0]
GRID = LADDER[4:9]


def beyond_edge(rows: pd.DataFrame) -> float | None:
    """The learning rate to try next where the best one lies on the grid's edge, else None."""
    best = rows.sort_values("accuracy").learning_rate.iloc[-1]
    rung = LADDER.index(best)
    if best == rows.learning_rate.max():
        return LADDER[rung + 1]
    return LADDER[rung - 1] if best == rows.learning_rate.min() else None


def swept(stage: str) -> str:
    """The method whose sweep gives the learning rate of a stage. A head has none, and names the bridge's."""
    if stage == "head":
        return "bridge-8"
    if stage.startswith("bridge") and not stage.endswith("-ids"):
        return "bridge-8"
    return stage.replace("-boundaries", "").removesuffix("-directions")


HEAD_RESPONSES = 1024


def steps_of(stages: list[str], steps: int) -> list[int]:
    """How many steps of 64 responses each stage has, so that all methods write equally many responses."""
    if "head" in stages:
        return [steps - HEAD_RESPONSES // 64, 0]
    return [steps // len(stages)] * len(stages)


def with_calibrated_head(pair, seed: int) -> dict:
    """Calibrate the student's head on its own responses; returns {"after"} as a run does."""
    from oprd_nb.evaluation.sampling import evaluate
    from oprd_nb.objectives.heads import calibrate_head
    from oprd_nb.rollouts.samplers import HFSampler
    from oprd_nb.teachers import Teacher

    sampler = HFSampler(pair.student, pair.tokenizer)
    prompts = pair.task.train["prompt"][:HEAD_RESPONSES]
    rollouts = sampler.sample(prompts, max_new_tokens=40, seed=seed)
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    print(calibrate_head(pair.student, teacher, rollouts, pair.tokenizer), flush=True)
    problems = pair.task.test.select(range(500))
    return {"after": evaluate(sampler, problems, n=4, seed=seed, max_new_tokens=40, progress=False)}


def bridge_for(stage: str, pair, seed: int):
    """The bridge a stage needs, fitted to the student as it is now; None for output-space methods."""
    from dataclasses import replace

    from oprd_nb.bridge.fitting import fit_from_prompts
    from oprd_nb.bridge.readout import ReadoutBridge
    from oprd_nb.teachers import Teacher

    kind, *options = stage.split("-")
    if kind == "opd":
        return None
    fitted = fit_from_prompts(
        pair.student,
        Teacher(pair.teacher, pair.teacher_tokenizer),
        pair.tokenizer,
        pair.task.train["prompt"][:1024],
        kind="pca" if kind == "bridge" else "readout",
        rank=int(options[0]) if options[:1] and options[0].isdigit() else "auto",
        positions="all",
        max_new_tokens=40,
        seed=seed,
    )
    if "every" in options:
        fitted = ReadoutBridge(replace(fitted.header, written=None), fitted.tensors)
    if "boundaries" not in options:
        return fitted
    return ReadoutBridge(
        replace(fitted.header, offsets=(0,), scores=fitted.header.scores[:1]),
        {name: tensor[:1] for name, tensor in fitted.tensors.items()},
    )


def scores_of(bridge) -> dict[str, float]:
    """What a bridge scored on held-out responses, mean over its layers or offsets."""
    kept = (
        bridge.scores if "rank" not in bridge.scores else bridge.scores[bridge.scores["rank"] == bridge.rank]
    )
    names = [name for name in ("rank", "cosine", "r2", "student", "ridge", "fitted") if name in kept]
    return kept[names].mean().add_prefix("heldout_").to_dict() | {"fitted_coverage": bridge.header.coverage}


def one_run(pair_name: str, method: str, rates: list[float], seed: int, steps: int, split: str) -> dict:
    """Train once, stage by stage, and measure the student before and after on `split`."""
    from oprd_nb.cli.arguments import quiet
    from oprd_nb.cli.demo import embedded_config
    from oprd_nb.cli.train import accuracy_of
    from oprd_nb.models.pairs import embedded
    from oprd_nb.objectives.terms import as_objective
    from oprd_nb.tasks.problems import Task
    from oprd_nb.training.experiment import METHODS as PLAIN
    from oprd_nb.training.experiment import bridge_term, distil_pair

    quiet()
    pair, stages, results, scores = embedded(pair_name), method.split(">"), [], {}
    row = dict(
        pair=pair_name,
        method=method,
        learning_rate=rates[0],
        later_rate=rates[-1],
        seed=seed,
        steps=steps,
        split=split,
    )
    pair.task = Task(pair.task.name, train=pair.task.train, test=getattr(pair.task, split))
    if method.endswith("-ids"):
        pair.teacher_tokenizer = pair.tokenizer
    for i, (stage, rate) in enumerate(zip(stages, rates, strict=True)):
        if stage == "head":
            results.append(with_calibrated_head(pair, seed))
            continue
        bridge = bridge_for(stage, pair, seed)
        scores |= scores_of(bridge) if bridge is not None else {}
        term = bridge and bridge_term(
            bridge, positions="all", distance="normalized_mse" if stage.endswith("-directions") else None
        )
        objective = as_objective(term) if bridge else PLAIN[stage]()
        pair.student.requires_grad_(True)
        with TemporaryDirectory() as folder:
            config = embedded_config(
                Path(folder), rate, steps_of(stages, steps)[i], seed + 1000 * i, eval_steps=steps
            )
            config.eval_strategy, config.eval_on_start, config.disable_tqdm = "no", False, True
            try:
                results.append(distil_pair(pair, objective, config, {"method": method}, held_out=500))
            except ValueError as error:
                if "min_coverage" not in str(error):
                    raise
                return (
                    row | dict(before=float("nan"), accuracy=0.0, coverage=0.0) | scores
                )  # a student that writes nothing the teacher could read
            coverage = pd.read_json(f"{folder}/metrics.jsonl", lines=True)["pairing/coverage"].mean()
    return (
        row
        | dict(
            before=accuracy_of(results[0]["before"]),
            accuracy=accuracy_of(results[-1]["after"]),
            coverage=coverage,
        )
        | scores
    )


def coverage_table(pair_name: str, prompts: int = 1024) -> pd.DataFrame:
    """Share of the student's tokens at each byte offset, and without a teacher row, on its own rollouts."""
    from oprd_nb.models.pairs import embedded
    from oprd_nb.rollouts.samplers import HFSampler
    from oprd_nb.teachers import Teacher

    pair = embedded(pair_name)
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.train["prompt"][:prompts], max_new_tokens=40
    )
    pairs = Teacher(pair.teacher, pair.teacher_tokenizer).read(rollouts, pair.tokenizer)
    shares = pairs.coverage_by_offset() | {"none": 1 - pairs.coverage}
    return pd.DataFrame({"pair": pair_name, "offset": list(shares), "share": list(shares.values())})


def run_missing(pool, path: Path, jobs: list[tuple]) -> pd.DataFrame:
    """Run what the table at `path` does not hold yet, adding each row as its run ends; returns the table."""
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEY)
    known = {tuple(row) for row in table[KEY].itertuples(index=False)}
    missing = [job for job in jobs if (job[1], job[2][0], job[2][-1], *job[3:]) not in known]
    for done in as_completed([pool.submit(one_run, *job) for job in missing]):
        row = done.result()
        print(
            "{method:20} lr {learning_rate:.0e} seed {seed} {split}: {before:.1%} -> {accuracy:.1%}".format(
                **row
            ),
            flush=True,
        )
        table = pd.concat([table, pd.DataFrame([row])], ignore_index=True).sort_values(KEY, ignore_index=True)
        table.to_csv(path, index=False, float_format="%.4g")
    return table


def sweep(pool, path: Path, pair: str, methods: list[str], steps: int) -> pd.DataFrame:
    """Validation accuracy of every method on the grid, grown where its best is on the edge."""
    rates = {method: list(GRID) for method in methods}
    while True:
        table = run_missing(
            pool,
            path,
            [
                (pair, method, [rate], 0, steps // 3 if method == "bridge-8" else steps, "validation")
                for method, grid in rates.items()
                for rate in grid
            ],
        )
        edges = {method: beyond_edge(table[table.method == method]) for method in methods}
        if not any(edges.values()):
            return table
        for method, rate in edges.items():
            rates[method] += [rate] if rate else []


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pair", default="cross_architecture", choices=METHODS)
    parser.add_argument("--methods", nargs="+", help="by default all of the pair")
    parser.add_argument("--rate_of", help="take the best learning rate of this method, in place of a sweep")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", default="nbs/results/cross_architecture")
    args = parser.parse_args()
    methods = args.methods or METHODS[args.pair]
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    if not Path(f"{args.out}_coverage.csv").exists():
        coverage_table(args.pair).to_csv(f"{args.out}_coverage.csv", index=False, float_format="%.4g")
    stages = list(
        dict.fromkeys(args.rate_of or swept(stage) for method in methods for stage in method.split(">"))
    )
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as pool:
        table = sweep(pool, Path(f"{args.out}_sweep.csv"), args.pair, stages, args.steps)
        best = table.loc[table.groupby("method").accuracy.idxmax()].set_index("method").learning_rate
        final = [
            (
                args.pair,
                m,
                [float(best[args.rate_of or swept(stage)]) for stage in m.split(">")],
                seed,
                args.steps,
                "test",
            )
            for m in methods
            for seed in args.seeds
        ]
        run_missing(pool, Path(f"{args.out}_final.csv"), final)


if __name__ == "__main__":
    main()
