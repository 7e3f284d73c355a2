"""Two processes take the steps that one takes: DDP and FSDP2 on gloo, with adapters, resumed, sampling."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file

WRAPPERS = {"ddp": "DistributedDataParallel", "fsdp2": "FSDP"}
EXAMPLES = Path(__file__).parents[1] / "examples" / "accelerate"


def run(folder: Path, *kinds: str) -> dict:
    ran = subprocess.run(
        [sys.executable, Path(__file__).parent / "two_processes.py", folder, *kinds],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def check(kind: str, result: dict) -> None:
    assert result["status"] == [0, 0, 0] and result["wrapper"].startswith(WRAPPERS[kind.split("-")[0]])
    one, two = result["losses"]
    assert len(one) == len(two) == 5 and all(
        math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-5) for a, b in zip(one, two, strict=True)
    )
    assert (
        len(result["gradients"]) == 5
        and max(result["gradients"]) <= 1e-5
        and result["final"] <= 1e-6
        and result["tensors"] >= 40
    )
    assert not result["rank1"] and result["bridges"] == 1 and result["metrics"]


def test_ddp_equals_one_process(tmp_path):
    check("ddp", run(tmp_path, "ddp")["ddp"])


@pytest.mark.slow
def test_groups_stay_whole_in_two_processes(tmp_path):
    check("ddp-reward", run(tmp_path, "ddp-reward")["ddp-reward"])


@pytest.mark.slow
def test_fsdp2_equals_one_process(tmp_path):
    for kind, result in run(
        tmp_path, "fsdp2", "fsdp2-headless", "fsdp2-lora", "fsdp2-lora-headless", "fsdp2-base"
    ).items():
        check(kind, result)


@pytest.mark.slow
def test_ddp_equals_one_process_with_adapters_and_without_a_head(tmp_path):
    for kind, result in run(tmp_path, "ddp-headless", "ddp-lora", "ddp-base").items():
        check(kind, result)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "fsdp2-lora"])
def test_two_processes_resume_from_the_last_good_checkpoint(kind, tmp_path):
    result = run(tmp_path, f"resume-{kind}")[f"resume-{kind}"]
    assert (
        result["status"] == [0] * 4 and result["steps"] == 2
    )  # of five: the checkpoint of step 5 is torn, that of step 3 is not
    assert (
        result["flaws"][0] is None
        and "4 bytes in place of" in result["flaws"][1]
        and {"rng_state_0.pth", "rng_state_1.pth", "complete.json"} <= set(result["files"])
    )
    assert result["final"] == 0 and result["losses"][0] == result["losses"][1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp-hf", "fsdp2-hf", "fsdp2-lora-trl"])
def test_two_processes_write_their_own_responses(kind, tmp_path):
    result = run(tmp_path, f"sample-{kind}")[f"sample-{kind}"]
    assert (
        result["status"] == [0, 0]
        and len(result["losses"]) == 5
        and all(map(math.isfinite, result["losses"]))
        and len(result["evaluated"]) == 1
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_example_configurations_are_read_by_accelerate(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 2 and config.mixed_precision == "bf16"
    settings = yaml.safe_load(path.read_text())
    if fsdp := settings.get("fsdp_config"):
        names = set(FullyShardedDataParallelPlugin.__dataclass_fields__)
        known = names | {"fsdp_" + name for name in names} | {"fsdp_offload_params"}
        assert fsdp["fsdp_version"] == 2 and fsdp.keys() <= known


def test_there_is_an_example_for_each_kind():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == {
        "ddp",
        "fsdp2",
        "deepspeed_zero2",
        "multi_node",
    }
