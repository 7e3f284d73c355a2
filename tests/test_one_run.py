"""One folder is one run: it resumes as the same, nobody else writes there, a stop loses nothing."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import yaml

from oprd_nb.cli import main
from oprd_nb.models.loading import load_model, load_tokenizer
from oprd_nb.runs import Evals, RunPaths
from oprd_nb.training.callbacks import remove_evaluations
from oprd_nb.training.checkpoints import last_good_checkpoint
from oprd_nb.training.lock import LOCK_FILE, run_lock

PAIR = ["embedded/student", "embedded/teacher", "arithmetic"]
SHORT = "--max_completion_length 40 --per_device_train_batch_size 8 --gradient_accumulation_steps 1"
SHORT += (
    " --use_cpu true --learning_rate 1e-3 --disable_tqdm true --limit 64 --save_strategy steps --save_steps 1"
)
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def train(folder, *changes, pair=PAIR):
    return main(["train", *pair, "--output_dir", str(folder), *SHORT.split(), *changes])


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run of one step with its checkpoint, and other students in folders of their own."""
    root = tmp_path_factory.mktemp("runs")
    assert train(root / "run", "--max_steps", "1") == 0
    for name, source in (("noisy", "embedded/student"), ("wide", "embedded/teacher_wide")):
        model = load_model(source, device="cpu")
        if name == "noisy":
            for parameter in model.parameters():
                parameter.data.mul_(1.01)
        model.save_pretrained(root / name)
        load_tokenizer(source).save_pretrained(root / name)
    return root


@pytest.fixture
def run(started, tmp_path):
    shutil.copytree(started / "run", tmp_path / "run")
    return tmp_path / "run"


OTHERS = {
    "seed": (["--seed", "7"], "seed=7 (it was 42)"),
    "rate": (["--learning_rate", "2e-3"], "learning_rate=0.002 (it was 0.001)"),
    "batch": (["--per_device_train_batch_size", "4"], "per_device_train_batch_size=4 (it was 8)"),
    "schedule": (["--lr_scheduler_type", "constant"], "lr_scheduler_type='constant'"),
    "limit": (["--limit", "32"], "limit=32 (it was 64)"),
    "objective": (["--method", "opd-full"], "method='opd-full' (it was 'oprd')"),
    "layers": (["--layers", "last"], "layers='last' (it was None)"),
    "bridge": (["--method", "readout"], "method='readout'"),
    "temperature": (["--temperature", "0.7"], "temperature=0.7"),
    "adapters": (["--lora", "4"], "lora=4 (it was None)"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_setting_is_not_the_same_run(what, run, capsys):
    changed, named = OTHERS[what]
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert train(run, "--max_steps", "2", "--resume", "true", *changed) == 2
    error = capsys.readouterr().err
    assert named in error and "--resume_anyway" in error, error
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("side, name", [(0, "noisy"), (0, "wide"), (1, "noisy"), (1, "wide")])
def test_another_model_is_not_the_same_run(side, name, run, started, capsys):
    pair = list(PAIR)
    pair[side] = str(started / name)
    assert train(run, "--max_steps", "2", "--resume", "true", pair=pair) == 2
    error = capsys.readouterr().err
    assert ("student=" if side == 0 else "teacher=") in error and "it was" in error, error


def test_a_model_that_changed_in_its_folder_is_not_the_same(started, tmp_path, capsys):
    """The same path with other weights of the same shape."""
    model = tmp_path / "student"
    shutil.copytree(started / "noisy", model)
    pair = [str(model), *PAIR[1:]]
    assert train(tmp_path / "run", "--max_steps", "1", pair=pair) == 0
    load_model("embedded/student", device="cpu").save_pretrained(model)
    assert train(tmp_path / "run", "--max_steps", "2", "--resume", "true", pair=pair) == 2
    assert "student_weights=" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:seed=7")
def test_resumed_anyway_both_are_noted(run):
    assert train(run, "--max_steps", "2", "--resume", "true", "--seed", "7", "--resume_anyway", "true") == 0
    about = json.loads((run / "about.json").read_text())
    assert about["resumed_with"] == {"seed": [42, 7]}
    assert yaml.safe_load((run / "config.yaml").read_text())["seed"] == 7


def test_more_steps_are_the_same_run(run):
    assert train(run, "--max_steps", "2", "--resume", "true") == 0
    assert last_good_checkpoint(run).name == "checkpoint-2"


def test_what_never_trained_is_never_named(run, monkeypatch, capsys):
    """A run that starts afresh and fails in its first step leaves the earlier run's folder as it was."""

    def broken(*_, **__):
        raise ValueError("a sampler that is broken")

    monkeypatch.setattr("oprd_nb.training.steps.position_losses", broken)
    config = (run / "config.yaml").read_text()
    assert train(run, "--max_steps", "2", "--seed", "9") == 2
    assert (run / "config.yaml").read_text() == config and (run / "checkpoint-1").is_dir()


@pytest.mark.filterwarnings("ignore:.*starts afresh")
def test_a_fresh_start_leaves_no_checkpoint_of_another_run(run):
    shutil.copytree(run / "checkpoint-1", run / "checkpoint-9")
    assert train(run, "--max_steps", "1", "--seed", "9") == 0
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-1"]


HOLD = "import sys, time\nfrom oprd_nb.training.lock import run_lock\nwith run_lock(sys.argv[1]):\n"
HOLD += "    print('held', flush=True)\n    time.sleep(60)\n"


def test_a_second_process_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path, capsys):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    try:
        assert holder.stdout.readline() == "held\n"
        started = time.perf_counter()
        assert train(tmp_path / "run", "--max_steps", "1") == 2
        assert time.perf_counter() - started < 1
        assert f"process {holder.pid} on" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with run_lock(tmp_path / "run"):
        pass
    assert f"process {holder.pid}" in (error := capsys.readouterr().err) and "has ended" in error
    assert not (tmp_path / "run" / LOCK_FILE).exists()


def test_a_lock_of_another_machine_is_not_taken_over(tmp_path):
    (tmp_path / LOCK_FILE).write_text(json.dumps({"process": 1, "host": "elsewhere", "since": "today"}))
    with pytest.raises(ValueError, match="process 1 on elsewhere.*may write there"), run_lock(tmp_path):
        pass
    (tmp_path / LOCK_FILE).write_text("damaged")
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("sent, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_what_is_safe(sent, code, tmp_path):
    """SIGTERM saves the step that was begun; both end with one line and the command that goes on."""
    run = tmp_path / "run"
    argv = ["train", *PAIR, "--output_dir", str(run), *SHORT.split(), "--max_steps", "100000"]
    argv[argv.index("--save_steps") + 1] = "100000" if sent == signal.SIGTERM else "1"
    process = subprocess.Popen(
        [sys.executable, "-m", "oprd_nb", *argv],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        # A shell starts what runs in the background with Ctrl-C ignored, and children inherit that.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 120
        log = run / "metrics.jsonl"
        while not (log.exists() and log.read_text().count("\n") >= 2) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(sent)
        _, error = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == code, error
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    checkpoint = last_good_checkpoint(run)
    assert last.startswith("oprd train: stopped by") and f"({checkpoint.name})" in last
    assert last.endswith("--resume true") and "go on with: oprd train embedded/student" in last
    assert not (run / LOCK_FILE).exists()


FULL = {
    "report": ("report {run} --out {run}/report.html", "{run}/report.html"),
    "bridge": (
        "bridge embedded/student embedded/teacher_wide --limit 64 --max_new_tokens 40 --out {run}/bridge",
        "{run}/bridge",
    ),
    "eval": (
        "eval embedded/student --task arithmetic --limit 4 --samples 1 --max_new_tokens 40 --into {run}",
        "eval",
    ),
    "export": ("export {run} --out {run}/model", "{run}/model"),
}


@pytest.mark.parametrize("command", FULL)
def test_a_full_disk_leaves_nothing_torn(command, run, capsys):
    """No file may grow over 1 kB while the command writes: what was there is whole, nothing half is there."""
    argv = FULL[command][0].format(run=run).split()
    (run / "report.html").write_text("the earlier page")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, limits[1]))
    try:
        code = main(argv)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert code in (1, 2) and "Traceback" not in error, error
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert after == before


@pytest.mark.parametrize(("last", "left"), [(0, []), (20, [10, 20])])
def test_evaluations_after_the_checkpoint_are_removed(tmp_path, last, left):
    """All of an earlier run where a run starts afresh, also what it answered before its first step."""
    paths = RunPaths(tmp_path)
    for name in ("eval", "tokens"):
        (tmp_path / name).mkdir()
        for when in ("after", *(paths.eval_at(step).stem for step in (10, 20, 30))):
            (tmp_path / name / f"{when}.parquet").touch()
    remove_evaluations(paths, last)
    for name in ("eval", "tokens"):
        assert list(Evals(tmp_path / name).steps.values()) == left
    assert paths.eval("after").exists() and paths.tokens("after").exists()
