"""Ask a GPU whether everything holds there, in at most eight minutes; prints the outcome, writes one JSON.

usage: gpu_check.py [--out FOLDER] [--parts parity,costs,student,tests] [--seconds 480] [--dry_run]

Each part runs in a process of its own: one that fails or takes too long is noted with its error, and the
others go on. `--dry_run` asks the emulated device (tests/emulated), or the CPU where there is no compiler, at
small sizes. What the parts are: nbs/50_bench/04_gpu.ipynb. Exit code 1 where something did not hold.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

LIMITS = {"parity": 90, "costs": 240, "student": 150, "tests": 240}
"""Most seconds of each part; all of them together have `--seconds`."""
BAR = 1e-4
"""Largest relative difference between a device and the CPU, in float32."""


def has_emulation() -> bool:
    """Whether the emulated device can be compiled here."""
    return bool(shutil.which("g++") and shutil.which("ninja"))


def start_device(is_dry: bool) -> str:
    """The device of this process: the accelerator; in a dry run the emulated one, or the CPU."""
    if is_dry and not has_emulation():
        return "cpu"
    if is_dry:
        from emulated.device import claim_bfloat16, start

        start(ROOT / "build" / "emulated")
        claim_bfloat16()
        os.environ["ACCELERATE_TORCH_DEVICE"] = "emu:0"
        return "emu:0"
    from oprd_nb.utils import best_device

    device = str(best_device())
    if device == "cpu":
        raise ValueError("there is no accelerator on this machine; --dry_run asks the emulated one")
    return device


def ask_parity(is_dry: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Gradients on the device against those on the CPU."""
    device = start_device(is_dry)
    from oprd_nb.bench.gpu import gradient_parity

    table = gradient_parity(device)
    worst = table.set_index("method")[["loss", "gradient"]].max(axis=1, skipna=False)
    # Written so that NaN counts as broken.
    broken = [f"{method}: differs by {value:.1e}" for method, value in worst.items() if not value <= BAR]
    return {"table": table.to_dict("records"), "broken": broken}


def ask_costs(is_dry: bool, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak of every loss, at the paper's shape or a tiny one."""
    device = start_device(is_dry)
    from oprd_nb.bench.measure import bench_on_device
    from oprd_nb.bench.methods import BACKBONES, OURS, PAPER, TINY

    shape = replace(TINY if is_dry else PAPER, device=device)
    measured = bench_on_device(shape, rounds=1 if is_dry else 3)
    broken = [f"{name}: {error}" for name, error in measured.failed.items() if name in (BACKBONES, *OURS)]
    rounds = measured.rounds.to_dict("records")
    return {"shape": asdict(shape), "rounds": rounds, "failed": measured.failed, "broken": broken}


def ask_student(is_dry: bool, options: argparse.Namespace) -> dict[str, Any]:
    """A few steps of a student in SmolLM2's shape, or a tiny one."""
    device = start_device(is_dry)
    from oprd_nb.bench.gpu import train_random
    from oprd_nb.bench.methods import SMOLLM2, TINY

    shape, steps, tokens = (TINY, 3, 16) if is_dry else (SMOLLM2, 20, 128)
    settings = {"use_cpu": True} if device == "cpu" else {}
    with TemporaryDirectory() as folder:
        table = train_random(folder, shape, steps, tokens, **settings)
    first, last = table["loss"].iloc[0], table["loss"].iloc[-1]
    broken = []
    if len(table) != steps:
        broken.append(f"{len(table)} of {steps} steps were logged")
    if not last < first:
        broken.append(f"the loss went from {first:.4g} to {last:.4g}")
    return {"shape": asdict(shape), "steps": table.to_dict("records"), "broken": broken}


def ask_tests(is_dry: bool, options: argparse.Namespace) -> dict[str, Any]:
    """The tests of the emulated device, on this one; in a dry run a part of them."""
    device = "emu" if is_dry else start_device(is_dry).split(":")[0]
    with TemporaryDirectory() as folder:
        report = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_emulated.py"]
        command += ["--device", device, f"--junitxml={report}"]
        if is_dry:
            command += ["--device_parts", "losses"]
        run = subprocess.run(command, cwd=ROOT, stdout=sys.stderr)
        if not report.exists():
            raise RuntimeError(f"pytest ended with {run.returncode} and left no report")
        cases = list(ElementTree.parse(report).iter("testcase"))
    broken = []
    skipped = 0
    for case in cases:
        skipped += case.find("skipped") is not None
        for failure in (*case.iter("failure"), *case.iter("error")):
            message = (failure.get("message") or "").strip().split("\n")[0]
            broken.append(f"{case.get('name')}: {message[:300]}")
    passed = len(cases) - skipped - len(broken)
    if not passed and not (is_dry and not has_emulation()):
        broken.append("no test passed")
    return {"passed": passed, "skipped": skipped, "broken": broken}


ASK: dict[str, Callable[[bool, argparse.Namespace], dict[str, Any]]] = {
    "parity": ask_parity,
    "costs": ask_costs,
    "student": ask_student,
    "tests": ask_tests,
}


def ask_alone(part: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """One part in a process of its own: what it found, or {"error": ...}; with its seconds."""
    started = time.perf_counter()
    with TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        command = [sys.executable, __file__, "--only", part, "--answer", str(answer)]
        if options.dry_run:
            command.append("--dry_run")
        try:
            run = subprocess.run(command, timeout=seconds, stderr=subprocess.PIPE, text=True)
            found = {"error": f"its process ended with {run.returncode}"}
            if answer.exists():
                found = json.loads(answer.read_text())
            if "error" in found:
                found["stderr"] = run.stderr.strip().splitlines()[-30:]
        except subprocess.TimeoutExpired:
            found = {"error": f"not done after {seconds:.0f} s"}
    return {"seconds": round(time.perf_counter() - started, 1)} | found


def about(is_dry: bool) -> dict[str, Any]:
    """Card, versions, date and commit."""
    import torch

    versions = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in ("torch", "transformers", "accelerate", "peft", "trl", "datasets"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    # A copy without git says by itself which commit it is of.
    commit = os.environ.get("OPRD_COMMIT", "")
    if not commit and shutil.which("git"):
        asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        commit = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    machine = "dry run on the emulated device" if has_emulation() else "dry run on the CPU"
    if not is_dry and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
    elif not is_dry:
        machine = "no CUDA device"
    stamp = {"machine": machine, "versions": versions, "time": time.strftime("%Y-%m-%d %H:%M")}
    return stamp | {"commit": commit or "unknown", "dry_run": is_dry}


def main(options: argparse.Namespace) -> int:
    """Ask every part, write after each; 0 where all held."""
    from oprd_nb.bench.gpu import outcomes
    from oprd_nb.utils import write_whole

    deadline = time.monotonic() + options.seconds
    check = about(options.dry_run)
    name = re.sub(r"[^a-z0-9]+", "-", check["machine"].lower()).strip("-")
    path = Path(options.out) / f"{name}.json"
    for part in options.parts.split(","):
        remaining = deadline - time.monotonic()
        check[part] = ask_alone(part, options, min(LIMITS[part], max(remaining, 1)))
        write_whole(path, json.dumps(check, indent=1))
        print(outcomes({part: check[part]}).to_string(index=False, header=False), flush=True)
    print(f"{check['machine']}: stored {path}")
    parts = [check[part] for part in options.parts.split(",")]
    return 1 if any(part.get("error") or part.get("broken") for part in parts) else 0


def answer(options: argparse.Namespace) -> None:
    """One part, in its own process: what it found, or its error, as JSON."""
    try:
        found = ASK[options.only](options.dry_run, options)
    except Exception as error:
        import traceback

        traceback.print_exc()
        lines = str(error).strip().splitlines() or [""]
        found = {"error": f"{type(error).__name__}: {lines[0][:500]}"}
    Path(options.answer).write_text(json.dumps(found))


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=None, help="folder of the JSON; by default nbs/results/gpu")
    parser.add_argument("--parts", default=",".join(ASK), help="what is asked, separated by commas")
    parser.add_argument("--seconds", type=float, default=480, help="most seconds for all parts together")
    parser.add_argument(
        "--dry_run", action="store_true", help="small sizes on the emulated device or the CPU"
    )
    parser.add_argument("--only", choices=list(ASK), help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - set(ASK):
        parser.error(f"--parts={options.parts}: {sorted(unknown)} are none of {list(ASK)}")
    if options.out is None:
        # What a dry run found is no result.
        options.out = ROOT / ("build/gpu" if options.dry_run else "nbs/results/gpu")
    return options


if __name__ == "__main__":
    given = parsed()
    if given.only:
        answer(given)
    else:
        sys.exit(main(given))
