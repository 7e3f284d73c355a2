"""End a small training run with SIGKILL at random moments, resume it, and compare its weights bit by bit.

usage: kills.py [--kills N] [--seed S] [--out FILE]

The run is that of `tests/killed_runs.py`: six steps of the embedded pair, a checkpoint every second step.
Each kill has a folder of its own, and is compared with a run that nothing interrupted. Exit code 1 where one
differs.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from killed_runs import STEPS, forked, lasting

RESULTS = Path(__file__).parents[1] / "nbs" / "results" / "kills.json"


def killed_after(seconds: float, folder: Path) -> bool:
    """Start the run and kill it after so many seconds; returns whether it was still going on."""
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        os._exit(abs(forked(folder=folder)))
    time.sleep(seconds)
    os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status) != 0


def compared(folder: Path, whole: Path) -> dict:
    """The resumed run against the whole one."""
    found = torch.load(folder / "final.pt")
    wanted = torch.load(whole / "final.pt")
    return {
        "resumed_from": int((folder / "resumed_from").read_text()),
        "bitwise": all(found[name].equal(wanted[name]) for name in wanted),
        "metrics": lasting(folder) == lasting(whole),
    }


def try_kills(kills: int, seed: int, folder: Path) -> dict:
    """What `kills` random moments left; moments are spread over the time of an uninterrupted run."""
    whole = folder / "whole"
    begin = time.monotonic()
    assert forked(folder=whole) == 0
    seconds = time.monotonic() - begin
    rng = random.Random(seed)
    results = []
    while len(results) < kills:
        moment = rng.uniform(0.1, seconds)
        with tempfile.TemporaryDirectory() as name:
            run = Path(name)
            if not killed_after(moment, run):
                continue  # It had ended before that moment.
            status = forked(folder=run, resume=True)
            results.append({"after_s": round(moment, 2), "exit_code": status} | compared(run, whole))
        print(results[-1], flush=True)
    return {
        "steps": STEPS,
        "whole_s": round(seconds, 1),
        "kills": len(results),
        "bitwise": sum(result["bitwise"] for result in results),
        "same_metrics": sum(result["metrics"] for result in results),
        "moments": results,
    }


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = try_kills(options.kills, options.seed, Path(folder))
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    return int(found["bitwise"] < found["kills"])


if __name__ == "__main__":
    sys.exit(main())
