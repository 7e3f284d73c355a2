"""`make gpu-check` without a GPU: the dry run, and what becomes of parts that fail or take too long."""

import argparse
import subprocess
import sys

import gpu_check
import pandas as pd
import pytest
import torch
from check_sync import ROOT

from oprd_nb.bench.gpu import PARTS, load_gpu_check, outcomes


@pytest.mark.slow
def test_the_dry_run_holds(tmp_path):
    command = [sys.executable, "tools/gpu_check.py", "--dry_run", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    (file,) = tmp_path.glob("*.json")
    check = load_gpu_check(file)
    table = outcomes(check)
    assert list(table.part) == list(PARTS) and set(table.outcome) == {"held"}, check
    assert run.returncode == 0 and check["dry_run"] and "torch" in check["versions"] and check["commit"]
    assert check["parity"]["table"].gradient.max() < 1e-5
    assert "oprd" in set(check["costs"]["rounds"].method) and check["costs"]["failed"] == {}
    assert len(check["student"]["steps"]) == 3
    if gpu_check.has_emulation():
        assert check["costs"]["shape"]["device"] == "emu:0" and check["tests"]["passed"] == 4


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_part_that_fails_is_noted_and_the_others_go_on(tmp_path):
    options = argparse.Namespace(dry_run=False, parts="parity,costs", seconds=300, out=tmp_path)
    assert gpu_check.main(options) == 1
    check = load_gpu_check(tmp_path / "no-cuda-device.json")
    for part in ("parity", "costs"):
        assert check[part]["error"].startswith("ValueError: there is no accelerator")
        assert any("start_device" in line for line in check[part]["stderr"])


def test_a_part_that_takes_too_long_is_ended():
    options = argparse.Namespace(dry_run=True)
    answer = gpu_check.ask_alone("student", options, seconds=0.3)
    assert answer["error"].startswith("not done after") and answer["seconds"] < 10


def test_a_difference_beyond_the_bar_does_not_hold(monkeypatch):
    table = pd.DataFrame({"method": ["oprd", "opd-full", "bridge"], "loss": [1e-7, 2e-4, 1e-6]})
    table["gradient"] = [1e-6, 1e-6, float("nan")]
    monkeypatch.setattr(gpu_check, "start_device", lambda is_dry: "cpu")
    monkeypatch.setattr("oprd_nb.bench.gpu.gradient_parity", lambda device: table)
    broken = gpu_check.ask_parity(True, argparse.Namespace())["broken"]
    assert broken == ["opd-full: differs by 2.0e-04", "bridge: differs by nan"]
