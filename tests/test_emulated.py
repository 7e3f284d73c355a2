"""What a GPU refuses or waits for, on an accelerator emulated in host memory; needs g++ and ninja.

Everything runs in a process of its own, `emulated/work.py`, since a process has one such device and keeps it.
`--device cuda` takes a real one, `--device_parts losses,training` some parts only.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from check_sync import ROOT
from filelock import FileLock

WORK = Path(__file__).parent / "emulated" / "work.py"
PLACES = ["device", "two devices", "host teacher"]
NO_COMPILER = not (shutil.which("g++") and shutil.which("ninja"))


class Results(dict):
    """What `work.py` printed; on a real device a part that was not asked for skips its tests."""

    may_lack = False

    def __missing__(self, name: str):
        if name in self["refused"]:
            pytest.fail(self["refused"][name])
        if not self.may_lack:
            raise KeyError(name)
        pytest.skip(f"{name}: not asked for, or too few devices")


@pytest.fixture(scope="session")
def results(tmp_path_factory, pytestconfig):
    """The results on the device that was asked for: made once, also where several processes run the tests."""
    device = pytestconfig.getoption("--device")
    parts = pytestconfig.getoption("--device_parts")
    if device == "emu" and NO_COMPILER:
        pytest.skip("needs g++ and ninja to compile the emulated device")
    shared = tmp_path_factory.getbasetemp()
    if shared.name.startswith("popen-"):
        shared = shared.parent
    stored = shared / "emulated.json"
    with FileLock(f"{stored}.lock"):
        if not stored.exists():
            command = [sys.executable, str(WORK), str(ROOT / "build" / "emulated"), "--device", device]
            if parts:
                command += ["--parts", parts]
            run = subprocess.run(command, capture_output=True, text=True, timeout=570)
            assert run.returncode == 0, run.stderr[-3000:]
            stored.write_text(run.stdout.splitlines()[-1])
    found = Results(json.loads(stored.read_text()))
    found.may_lack = device != "emu" or bool(parts)
    return found


def assert_same(values: dict[str, list[float]], expected: dict[str, list[float]]):
    assert values.keys() == expected.keys()
    for name, numbers in expected.items():
        assert values[name] == pytest.approx(numbers, rel=1e-4, abs=1e-7), name


def test_nothing_mixes_devices(results):
    assert results["refused"] == {}


@pytest.mark.parametrize("place", [*PLACES, "split"])
def test_losses_and_gradients_are_those_of_the_cpu(results, place):
    assert_same(results[f"losses, {place}"], results["losses, cpu"])


@pytest.mark.parametrize("place", PLACES)
def test_bridges_are_those_of_the_cpu(results, place):
    assert_same(results[f"bridges, {place}"], results["bridges, cpu"])


@pytest.mark.parametrize("place", PLACES)
def test_measurements_are_those_of_the_cpu(results, place):
    assert_same(results[f"measured, {place}"], results["measured, cpu"])


@pytest.mark.parametrize("place", PLACES)
def test_adapters_on_the_head_count_outside_the_trainer(results, place):
    loss, gradient, _ = results[f"adapters on the head, {place}"]
    without, _, _ = results["losses, cpu"]["full"]
    assert [loss, gradient] == pytest.approx(results["adapters on the head, cpu"][:2], rel=1e-4)
    assert abs(loss - without) > 0.01 * without


def test_answers_are_those_of_the_cpu(results):
    assert results["evaluation, device"] == results["evaluation, cpu"]


@pytest.mark.parametrize("place", ["device", "two devices"])
def test_training_is_that_of_the_cpu(results, place):
    losses = results[f"training, {place}"]["losses"]
    assert len(losses) == 2 and losses == pytest.approx(results["training, cpu"]["losses"], rel=1e-4)


@pytest.mark.parametrize("place", ["device", "two devices"])
def test_a_micro_batch_of_the_trainer_waits_a_bounded_number_of_times(results, place):
    run = results[f"training, {place}"]
    assert 0 < run["waits"] <= 25, run["lines"]


@pytest.mark.parametrize("objective", ["representation", "full", "bridge", "sum"])
def test_waits_do_not_grow_with_the_layers(results, objective):
    shallow = results["counts"][f"{objective}, 4 layers"]
    deep = results["counts"][f"{objective}, 28 layers"]
    assert 0 < deep["waits"] <= 25, deep["lines"]
    assert abs(deep["waits"] - shallow["waits"]) <= 3, deep["lines"]


def test_distances_take_few_launches(results):
    # One layer of 4,000 positions at the paper's width, in bfloat16; there are 28.
    assert 10 < results["counts"]["distances"]["operators"] <= 2000 / 28


@pytest.mark.parametrize(("measurement", "most"), [("diagnose", 200), ("linear_probe", 500)])
def test_measurements_wait_a_bounded_number_of_times(results, measurement, most):
    seen = results["counts"][measurement]
    assert 0 < seen["waits"] <= most, seen["lines"]
