"""Change one operator, comparison or constant of a module at a time: do the module's own tests notice?

usage: mutants.py [--every N] [--first N] [--seconds S] [MODULE...]

MODULE: a file under `oprd_nb`, such as `objectives/distances.py`; without any, all of `TESTS`.
--every N: only every N-th mutant of each module, from a place that depends on the module alone.
--first N: at most N mutants of each module.
--seconds S: a test run that takes longer counts as having noticed (60).

Prints each survivor, and one line per module; what a run found about a module replaces that module's line in
`nbs/results/mutants.csv`. Exit code 1 for survivors that `EQUIVALENT` does not name.
"""

import argparse
import ast
import copy
import csv
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "nbs" / "results" / "mutants.csv"
COLUMNS = ["module", "mutants", "tried", "killed", "equivalent", "unexplained"]

TESTS = {
    "capture.py": ["test_capture.py"],
    "teachers.py": ["test_teachers.py", "test_prompted_teacher.py", "test_prompt_sides.py"],
    "pairing/layers.py": ["test_pairing.py"],
    "pairing/positions.py": ["test_pairing.py"],
    "pairing/token_bytes.py": ["test_pairing.py"],
    "objectives/distances.py": ["test_objectives.py"],
    "objectives/terms.py": ["test_objectives.py"],
    "objectives/representation.py": ["test_objectives.py", "test_bridge.py"],
    "objectives/output_space.py": ["test_objectives.py"],
    "objectives/objective.py": ["test_objectives.py", "test_several.py"],
    "structure/moments.py": ["test_structure.py"],
    "structure/ridge.py": ["test_structure.py"],
    "structure/ranks.py": ["test_structure.py"],
    "bridge/base.py": ["test_bridge.py"],
    "bridge/pca.py": ["test_bridge.py"],
    "bridge/readout.py": ["test_bridge.py"],
    "training/batching.py": ["test_ragged.py"],
    "training/diagnostics.py": ["test_training.py"],
    "training/steps.py": ["test_training.py"],
    "evaluation/metrics.py": ["test_evaluation.py"],
    "evaluation/sampling.py": ["test_evaluation.py"],
    "evaluation/comparison.py": ["test_evaluation.py"],
}
"""The tests of each module."""

EQUIVALENT: dict[tuple[str, str, str], str] = {
    (
        "pairing/positions.py",
        "teacher_positions = own_position.masked_fill(~paired, -1)",
        "(-2)",
    ): "every negative position is none",
    (
        "pairing/token_bytes.py",
        "if known != state:",
        "(known == state)",
    ): "nothing is remembered: slower, with the same result",
    (
        "pairing/positions.py",
        'worst = [f"response {i}: {by_response[i]:.0%}" for i in by_response.argsort()[:5].tolist()]',
        "(6)",
    ): "how many responses a warning names",
    (
        "objectives/objective.py",
        "return Target(make, shared_with=captured[key] if self.num_readers[key] > 1 else None)",
        "(self.num_readers[key] >= 1)",
    ): "what one term alone reads is kept a little longer; the numbers are the same",
    (
        "training/batching.py",
        "last = torch.where(mask, columns, -1).amax(1)",
        "(-2)",
    ): "a response that attends to nothing has a span below one either way",
    ("objectives/distances.py", "CHUNK_BYTES = 2**25", "(26)"): "the size of a chunk changes no result",
    ("structure/moments.py", "CHUNK = 1024", "(1025)"): "the size of a chunk changes no result",
    (
        "structure/ridge.py",
        "unexplained = own[0].clamp(min=torch.finfo(own.dtype).tiny)",
        "(1)",
    ): "at the two largest penalties nothing is explained: the scores differ by a ten-thousandth",
    (
        "structure/ranks.py",
        "resamples: int = 1000,",
        "(1001)",
    ): "one more resample changes an interval by less than its own error",
    (
        "evaluation/sampling.py",
        "numbers = parameter.detach().flatten()[:8].float().cpu().numpy()",
        "(9)",
    ): "one more number per parameter marks the same weights as well",
    ("structure/ranks.py", "batch=100,", "(101)"): "the size of a batch changes no result",
    ("structure/moments.py", "seed: int = 0,", "(1)"): "another seed by default is as good",
    (
        "evaluation/comparison.py",
        "n_resamples=9999,",
        "(10000)",
    ): "one more permutation changes p by less than its own error",
}
"""(module, line as it is, what took the place of a part of it): why no test can tell."""

OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
"""What takes the place of each operator."""


@dataclass
class Mutant:
    """One changed expression; `start` and `end`: its first and last byte in the file."""

    line: int
    start: int
    end: int
    code: str


def is_negative(node: ast.AST) -> bool:
    """Whether this is a negative number such as -1."""
    return (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
    )


def changed(node: ast.AST) -> ast.AST | None:
    """The expression with another operator or constant; None where nothing is to be changed."""
    new = copy.deepcopy(node)
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OPERATORS:
        new.op = OPERATORS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in OPERATORS:
        new.ops[0] = OPERATORS[type(node.ops[0])]()
    elif is_negative(node):
        new.operand.value += 1
    elif isinstance(node, ast.UnaryOp):
        new = new.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        new.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        new.value = node.value + 1
    else:
        return None
    return new


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """All expressions that decide something: no annotations, texts of errors, `strict`, `__all__`."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.Raise | ast.JoinedStr):
                continue
            is_alias = isinstance(child, ast.Assign) and ast.unparse(child.targets[0]) == "__all__"
            is_warning = isinstance(child, ast.Call) and ast.unparse(child.func) == "warnings.warn"
            is_check = isinstance(child, ast.keyword) and child.arg == "strict"
            if is_alias or is_warning or is_check:
                continue
            yield child
            if not is_negative(child):
                yield from expressions(child)


def mutants_of(source: str) -> list[Mutant]:
    """Every mutant of a module, in the order of its lines."""
    starts = [0]
    for line in source.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = []
    for node in expressions(ast.parse(source)):
        new = changed(node)
        if new is not None:
            start = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            found.append(Mutant(node.lineno, start, end, f"({ast.unparse(new)})"))
    return sorted(found, key=lambda mutant: (mutant.start, mutant.end))


def notices(package: Path, tests: list[str], seconds: float) -> bool:
    """Whether the tests fail, or take longer than `seconds`, with the package in the folder `package`.

    In a fork of this process, which has loaded the large libraries already.
    """
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        sys.path.insert(0, str(package))
        os.environ["PYTHONPATH"] = str(package)
        import pytest

        paths = [str(ROOT / "tests" / test) for test in tests]
        os._exit(int(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *paths])))
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status) != 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def try_mutants(module: str, package: Path, every: int, first: int | None, seconds: float) -> dict:
    """Try the mutants of one module; prints the survivors and returns the module's line of the results."""
    path = package / "oprd_nb" / module
    source = path.read_text()
    lines = source.splitlines()
    mutants = mutants_of(source)
    chosen = mutants[len(module) % every :: every][:first]
    if notices(package, TESTS[module], 10 * seconds):
        raise SystemExit(f"{module}: its tests fail without any change")
    reasons = []
    for mutant in chosen:
        data = source.encode()
        path.write_bytes(data[: mutant.start] + mutant.code.encode() + data[mutant.end :])
        if notices(package, TESTS[module], seconds):
            continue
        line = lines[mutant.line - 1].strip()
        reason = EQUIVALENT.get((module, line, mutant.code))
        reasons.append(reason)
        print(f"survived: {module}:{mutant.line}: {line}  <-  {mutant.code}  {reason or ''}", flush=True)
    path.write_text(source)
    unexplained = reasons.count(None)
    return {
        "module": module,
        "mutants": len(mutants),
        "tried": len(chosen),
        "killed": len(chosen) - len(reasons),
        "equivalent": len(reasons) - unexplained,
        "unexplained": unexplained,
    }


def store(result: dict, path: Path) -> None:
    """Write one module's line into the results, in place of its earlier one, in the order of `TESTS`."""
    results = {}
    if path.exists():
        with open(path, newline="") as file:
            results = {line["module"]: line for line in csv.DictReader(file)}
    results[result["module"]] = result
    # Not `oprd_nb.utils.replacing`: a package that is loaded here would hide the changed one from the forks.
    unfinished = path.with_suffix(".part")
    with open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(results[module] for module in TESTS if module in results)
    unfinished.replace(path)


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", metavar="MODULE", help=f"of {', '.join(TESTS)}")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    unknown = [module for module in options.modules if module not in TESTS]
    if unknown:
        parser.error(f"MODULE: {unknown} have no tests in TESTS; choose from {', '.join(TESTS)}")
    os.chdir(ROOT)
    import pandas  # noqa: F401  (loaded once, for all forks)
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder)
        shutil.copytree(ROOT / "oprd_nb", package / "oprd_nb", ignore=shutil.ignore_patterns("__pycache__"))
        sys.dont_write_bytecode = True
        unexplained = 0
        for module in options.modules or TESTS:
            result = try_mutants(module, package, options.every, options.first, options.seconds)
            print(", ".join(f"{name} {value}" for name, value in result.items()), flush=True)
            store(result, RESULTS)
            unexplained += result["unexplained"]
    return int(unexplained > 0)


if __name__ == "__main__":
    sys.exit(main())
