"""Killed at any moment, a resumed run ends as if nothing had happened; unfinished files are never read."""

import errno
import json
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_qwen3
from peft import LoraConfig
from short_runs import short_run
from transformers import TrainerCallback

from oprd_nb.bridge.pca import Bridge
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.structure.moments import Moments
from oprd_nb.teachers import Teacher
from oprd_nb.training.callbacks import RunFolder
from oprd_nb.training.checkpoints import (
    MANIFEST,
    checkpoint_problem,
    checkpoint_to_resume,
    checkpoints_of,
    last_good_checkpoint,
    write_manifest,
)
from oprd_nb.training.config import OPRDConfig
from oprd_nb.training.steps import EpochSampler
from oprd_nb.training.trainer import OPRDTrainer
from oprd_nb.utils import append_jsonl, read_jsonl

ONE_A_KIND = ["rollout:4", "backward:5", "optimizer:4", "full:4"]
THREE_A_KIND = [
    "rollout:1",
    "rollout:3",
    "rollout:6",
    "backward:1",
    "backward:4",
    "backward:6",
    "weights:2",
    "optimizer:6",
    "state:4",
    "manifest:4",
    "lora-rollout:5",
    "lora-backward:3",
    "lora-weights:4",
    "lora-optimizer:6",
]


def killed(folder: Path, kills: list[str]) -> dict:
    ran = subprocess.run(
        [sys.executable, Path(__file__).parent / "killed_runs.py", folder, *kills],
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


def check(kill: str, result: dict) -> None:
    place, step = kill.removeprefix("lora-").split(":")
    assert result["whole"] == {"again": 0, "after the end": 0} and result["resumed"] == 0
    assert result["died"] == (1 if place == "full" else -9)
    good = [int(name.split("-")[1]) for name, flaw in result["left"].items() if flaw is None]
    torn = [name for name, flaw in result["left"].items() if flaw]
    assert (
        result["from"] == max(good, default=0) and 0 <= int(step) - 1 - result["from"] <= 2
    )  # what has to be done again
    assert torn == ([] if place in ("rollout", "backward", "full") else [f"checkpoint-{step}"])
    assert (
        place != "full"
        or f"checkpoint-{step} could not be written" in result["said"]
        and "the last good checkpoint is checkpoint-2" in result["said"]
    )
    assert (
        result["bitwise"] and result["metrics"] and result["lines"] == 10
    )  # six steps, an evaluation before and after every second
    assert result["checkpoints"] == [None, None]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return killed(tmp_path_factory.mktemp("killed"), ONE_A_KIND)


@pytest.mark.parametrize("kill", ONE_A_KIND)
def test_a_killed_run_ends_as_if_nothing_had_happened(kill, results):
    check(kill, results[kill])


@pytest.mark.slow
@pytest.mark.parametrize("third", range(3))
def test_killed_at_three_places_of_each_kind_and_with_adapters(third, tmp_path):
    for kill, result in killed(tmp_path, THREE_A_KIND[third::3]).items():
        check(kill, result)


@pytest.fixture
def checkpoint(tmp_path):
    """A complete checkpoint of a tiny model, and an older one."""
    for step in (1, 2):
        tiny_qwen3(seed=step).save_pretrained(tmp_path / f"checkpoint-{step}")
        torch.save({"state": torch.ones(50)}, tmp_path / f"checkpoint-{step}" / "optimizer.pt")
        (tmp_path / f"checkpoint-{step}" / "global_step").mkdir()
        (tmp_path / f"checkpoint-{step}" / "global_step" / "shard.bin").write_bytes(b"12345")
        write_manifest(tmp_path / f"checkpoint-{step}")
    return tmp_path / "checkpoint-2"


DAMAGES = {
    "a byte of the weights": lambda folder: (folder / "model.safetensors").write_bytes(
        (folder / "model.safetensors").read_bytes()[:-1] + b"!"
    ),
    "a shorter optimizer": lambda folder: (folder / "optimizer.pt").write_bytes(
        (folder / "optimizer.pt").read_bytes()[:-9]
    ),
    "an empty configuration": lambda folder: (folder / "config.json").write_text(""),
    "a missing shard": lambda folder: (folder / "global_step" / "shard.bin").unlink(),
    "no manifest": lambda folder: (folder / MANIFEST).unlink(),
    "half a manifest": lambda folder: (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:100]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage, checkpoint):
    assert last_good_checkpoint(checkpoint.parent) == checkpoint
    DAMAGES[damage](checkpoint)
    assert checkpoint_problem(checkpoint)
    with pytest.warns(UserWarning, match="checkpoint-2: not used"):
        assert last_good_checkpoint(checkpoint.parent).name == "checkpoint-1"
    with pytest.raises(ValueError, match="use .*checkpoint-1"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint_to_resume(checkpoint.parent, checkpoint)


def test_only_checkpoints_are_taken_for_checkpoints(tmp_path):
    for name in ("checkpoint-10", "checkpoint-9", "checkpoint-9-old", "checkpoints", "eval"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-9", "checkpoint-10"]
    assert checkpoint_problem(tmp_path / "checkpoint-12") == "there is no such folder"


def trainer_for(pair, folder, callbacks=None, peft_config=None, **changes):
    settings = dict(per_device_train_batch_size=4, save_strategy="steps", save_steps=1)
    return OPRDTrainer(
        model=pair.student,
        teacher=Teacher(pair.teacher, pair.tokenizer),
        objective=FullKL(),
        args=short_run(folder, **(settings | changes)),
        train_dataset=pair.task.train,
        eval_dataset=pair.task.validation.select(range(20)),
        processing_class=pair.tokenizer,
        callbacks=callbacks,
        peft_config=peft_config,
    )


def test_the_trainer_refuses_a_torn_checkpoint_it_is_pointed_at(same, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    trainer = trainer_for(same, tmp_path)
    with pytest.raises(ValueError, match="checkpoint-2'?: it has no complete.json"):
        trainer.train(resume_from_checkpoint=tmp_path / "checkpoint-2")


def test_the_order_of_prompts_depends_on_the_epoch_and_not_on_the_process():
    options = dict(
        data_source=range(10), mini_repeat_count=2, batch_size=5, repeat_count=2, shuffle=True, seed=3
    )
    epoch = 0
    through = EpochSampler(lambda: epoch, **options)
    orders = []
    for epoch in range(3):  # noqa: B007 (read by the sampler)
        orders.append(list(through))
    assert len({tuple(order) for order in orders}) == 3
    assert list(EpochSampler(lambda: 2, **options)) == orders[2]


def test_a_resumed_run_says_what_changed_and_refuses_another_bridge(tmp_path):
    def bridge(seed):
        moments = Moments([(1, 1)], 4, 4)
        moments.update((1, 1), *torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(seed)))
        return Bridge.fit(moments, rank=2)

    state = SimpleNamespace(is_world_process_zero=True, global_step=0)
    RunFolder(tmp_path, {"seed": 0}, {"versions": {"torch": "1"}}, bridge(0)).on_train_begin(
        None, state, None
    )
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 1, "seconds": 2.5})
    state.global_step = 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = RunFolder(tmp_path, {"seed": 0}, {"versions": {"torch": "2"}}, bridge(0))
        again.on_train_begin(None, state, None)
    assert again.seconds == 2.5 and read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 1, "seconds": 2.5}]
    with pytest.raises(ValueError, match=r"seed=1 \(it was 0\): the run that is resumed was started"):
        RunFolder(tmp_path, {"seed": 1}, bridge=bridge(0)).on_train_begin(None, state, None)
    anyway = SimpleNamespace(resume_anyway=True)
    with pytest.warns(UserWarning, match=r"seed=1 \(it was 0\): resumed anyway"):
        RunFolder(tmp_path, {"seed": 1}, bridge=bridge(0)).on_train_begin(anyway, state, None)
    with pytest.raises(ValueError, match="bridge: is not the one"):
        RunFolder(tmp_path, {"seed": 1}, bridge=bridge(1)).on_train_begin(anyway, state, None)


@pytest.mark.parametrize(
    "said, meant",
    [
        ("true", True),
        ("True", True),
        (True, True),
        ("false", None),
        (None, None),
        ("runs/a/checkpoint-3", "runs/a/checkpoint-3"),
    ],
)
def test_a_command_line_says_true_in_letters(said, meant, tmp_path):
    assert (
        OPRDConfig(
            str(tmp_path), bf16=False, use_cpu=True, resume_from_checkpoint=said
        ).resume_from_checkpoint
        == meant
    )


class Offline(TrainerCallback):
    """A logger that lost its network."""

    def on_log(self, args, state, control, **_):
        raise ConnectionError("no route to host")


def test_a_logger_that_raises_is_a_warning(same, tmp_path):
    with pytest.warns(UserWarning, match="Offline: could not log .*no route to host"):
        trainer_for(same, tmp_path, [Offline()]).train()
    assert [line["step"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [
        1,
        2,
        3,
    ] and checkpoint_problem(tmp_path / "checkpoint-3") is None


def test_a_disk_that_is_full_leaves_the_last_good_checkpoint(same, tmp_path, monkeypatch):
    def full(state, path, *rest):
        if "checkpoint-3" in str(path) and str(path).endswith("optimizer.pt"):
            Path(path).write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(state, path, *rest)

    save = torch.save
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(
        OSError,
        match="checkpoint-3 could not be written .*No space left.*"
        "the last good checkpoint is checkpoint-2: free some space and resume",
    ):
        trainer_for(same, tmp_path, save_total_limit=1).train()
    assert [path.name for path in checkpoints_of(tmp_path)] == ["checkpoint-2"] and checkpoint_problem(
        tmp_path / "checkpoint-2"
    ) is None


def test_a_line_for_which_there_is_no_room_is_a_warning_and_leaves_no_half(tmp_path, monkeypatch):
    with pytest.warns(UserWarning, match="step 7 could not be written .*No space left"):
        append_jsonl(Path("/dev/full"), {"step": 7})
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 5, limits[1]))
    try:
        with pytest.warns(UserWarning, match="step 2 could not be written"):
            append_jsonl(path, {"step": 2, "loss": 0.5})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    append_jsonl(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_a_folder_that_cannot_be_written_is_told_before_training(same, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("")
    with pytest.raises(ValueError, match="taken is a file; give a folder"):
        trainer_for(same, tmp_path / "taken" / "run")
    with pytest.raises(OSError, match="'/proc/oprd'"):  # where even root may not
        trainer_for(same, "/proc/oprd")
    with pytest.raises(OSError, match="output_dir='/proc/oprd': cannot be written"):
        RunFolder("/proc/oprd", {}).on_train_begin(
            None, SimpleNamespace(is_world_process_zero=True, global_step=0), None
        )
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ValueError, match="cannot be written; give a folder on a disk that can"):
        trainer_for(same, tmp_path / "run")
    assert not (tmp_path / "run").exists()


class IdleFirstStep(TrainerCallback):
    """The first step of the optimizer changes nothing."""

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **_):
        if state.global_step == 0:
            for group in optimizer.param_groups:
                group["lr"] = 0.0


@pytest.mark.parametrize("adapters", [False, True])
def test_the_best_checkpoint_by_held_out_accuracy_is_the_result(adapters, same, tmp_path):
    """The rate destroys the student after the first step, which is idle: the best is the first."""
    config = LoraConfig(r=4, target_modules="all-linear") if adapters else None
    trainer = trainer_for(
        same,
        tmp_path,
        peft_config=config,
        learning_rate=3.0,
        save_total_limit=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="avg@1",
    )
    trainer.add_callback(IdleFirstStep())
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    accuracies = [
        line["eval/avg@1"] for line in read_jsonl(tmp_path / "metrics.jsonl") if "eval/avg@1" in line
    ]
    assert accuracies[0] > max(accuracies[1:]) and trainer.args.greater_is_better
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1" and [
        path.name for path in checkpoints_of(tmp_path)
    ] == ["checkpoint-1"]
    assert all(p.equal(before[name]) for name, p in trainer.model.named_parameters())
    (tmp_path / "checkpoint-1" / "trainer_state.json").write_text("{")
    with pytest.raises(
        ValueError,
        match="load_best_model_at_end=True: .*checkpoint-1 cannot be loaded, trainer_state.json has 1 bytes",
    ):
        trainer._load_best_model()
