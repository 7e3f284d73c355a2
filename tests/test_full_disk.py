"""A disk that fills up while a file is written: earlier files stay whole, nothing half-written is left.

No file may grow beyond a limit: what writing meets then is what a full disk does to it.
"""

import resource
import shutil
from contextlib import contextmanager

import pandas as pd
import pytest
import torch

from oprd_nb.bench.methods import Shape
from oprd_nb.bench.results import save_bench
from oprd_nb.cli import main
from oprd_nb.core import Rollouts
from oprd_nb.explore.scores import TOKEN_COLUMNS, save_tokens
from oprd_nb.models.loading import EMBEDDED
from oprd_nb.plots.report import write_report
from oprd_nb.runs.folder import write_about, write_settings
from oprd_nb.runs.synthetic import synthetic_run
from oprd_nb.runs.tables import add_to_summary
from oprd_nb.structure.moments import Moments
from oprd_nb.training.callbacks import cut_metrics
from oprd_nb.training.card import write_card
from oprd_nb.training.export import export_model
from oprd_nb.utils import append_jsonl, write_whole

PAIR = ["embedded/student", "embedded/teacher"]
WIDE = ["embedded/student", "embedded/teacher_wide"]
FEW = ["--limit", "8", "--max_new_tokens", "8", "--device", "cpu"]


@contextmanager
def full_after(size):
    """No file grows beyond `size` bytes."""
    earlier = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, earlier[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, earlier)


def files_below(folder):
    """The content of every file."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def made_up_rollouts():
    ids = torch.arange(40).reshape(4, 10)
    response = torch.zeros(4, 10, dtype=torch.bool)
    response[:, 5:] = True
    return Rollouts(ids, torch.ones(4, 10, dtype=torch.bool), response)


def made_up_metrics():
    return pd.DataFrame({"metric": ["avg@1"], "value": [0.5], "low": [0.4], "high": [0.6]})


WRITERS = {
    "config.yaml": lambda run: write_settings(run, {"method": "oprd", "label": "x" * 300}),
    "about.json": lambda run: write_about(run, {"label": "x" * 300}),
    "summary.json": lambda run: add_to_summary(run, "after", made_up_metrics()),
    "metrics.jsonl": lambda run: cut_metrics(run / "metrics.jsonl", 5),
    "tokens": lambda run: save_tokens(pd.DataFrame({c: ["a"] for c in TOKEN_COLUMNS}), run, "after"),
    "report": lambda run: write_report([run], run / "report.html"),
    "card": lambda run: write_card(run, run / "export"),
    "rollouts": lambda run: made_up_rollouts().save(run / "rollouts.safetensors"),
    "moments": lambda run: Moments([(1, 1)], 8, 8).save(run / "moments.safetensors"),
    "bench": lambda run: save_bench(run / "bench.json", Shape(), table=made_up_metrics()),
    "text": lambda run: write_whole(run / "page.html", "x" * 1000),
    "export": lambda run: (shutil.rmtree(run / "model", True), export_model(PAIR[0], run / "model")),
}


@pytest.mark.parametrize("what", WRITERS)
def test_a_file_that_cannot_be_written_leaves_the_earlier_one(what, tmp_path):
    run = synthetic_run(tmp_path / "run", "oprd", steps=12, problems=6)
    WRITERS[what](run)
    if what == "export":
        shutil.rmtree(run / "model")
    before = files_below(tmp_path)
    with (
        full_after(100_000 if what == "export" else 20),
        pytest.raises(OSError, match="there is no space; free some"),
    ):
        WRITERS[what](run)
    assert files_below(tmp_path) == before
    WRITERS[what](run)


def test_a_line_of_the_log_that_does_not_fit_leaves_whole_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    with full_after(20), pytest.warns(UserWarning, match="step 2 could not be written"):
        append_jsonl(path, {"step": 2, "loss": 0.5})
    append_jsonl(path, {"step": 3})
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


COMMANDS = {
    # command, bytes that fit into a file, the file that does not
    "report": (["report", "good", "--out", "out/report.html"], 50_000, "report.html"),
    "probe": (["probe", *PAIR, "arithmetic", "--out", "out", *FEW], 20_000, ""),
    "bridge": (["bridge", *WIDE, "arithmetic", "--out", "out", *FEW], 300, "bridge.safetensors"),
    "eval": (
        ["eval", PAIR[0], "--task", "arithmetic", "--out", "out", "--samples", "1", *FEW],
        300,
        "parquet",
    ),
    "export": (["export", "model", "--out", "out/model"], 100_000, "out/model"),
    "train": (
        ["train", *PAIR, "arithmetic", "--output_dir", "out", "--max_steps", "1", "--use_cpu", "true"],
        100,
        "config.yaml",
    ),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_on_a_full_disk_ends_in_one_line(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    synthetic_run(tmp_path / "good", "oprd", steps=12, problems=6)
    shutil.copytree(EMBEDDED / "student", tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "report.html").write_text("an earlier page")
    before = files_below(tmp_path)
    argv, size, named = COMMANDS[command]
    with full_after(size):
        code = main(argv)
    error = capsys.readouterr().err
    assert code == 2 and error.count(f"oprd {command}: ") == 1, error
    line = error[error.index(f"oprd {command}: ") :]
    assert named in line and "there is no space; free some" in line, line
    after = files_below(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after if path.suffix == ".part"], after.keys()
