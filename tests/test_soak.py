"""A run that is killed at random moments, and one of a thousand steps; and what was stored of both."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_tool(name, folder, *options):
    """What one of the tools stores."""
    out = folder / "result.json"
    command = [sys.executable, str(ROOT / "tools" / name), "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text())


def stored(name):
    """What was stored with the project."""
    return json.loads((ROOT / "nbs" / "results" / name).read_text())


def check_kills(found):
    assert found["kills"] == 30
    assert found["bitwise"] == found["same_metrics"] == 30
    # Moments before the first checkpoint, and after each of the others but the last.
    assert {moment["resumed_from"] for moment in found["moments"]} >= {0, 2, 4}


def check_soak(found):
    assert found["steps"] == 1000
    assert found["memory_growth"] < 0.05


def test_the_stored_kills():
    check_kills(stored("kills.json"))


def test_the_stored_soak():
    check_soak(stored("soak.json"))


@pytest.mark.slow
def test_thirty_random_kills(tmp_path):
    check_kills(run_tool("kills.py", tmp_path, "--seed", "1"))


@pytest.mark.slow
def test_a_thousand_steps(tmp_path):
    check_soak(run_tool("soak.py", tmp_path))
