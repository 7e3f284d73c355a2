"""`oprd sweep`: runs of `oprd train`; validation chooses, test is reported, and what has ended stays."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from oprd_nb.cli import main
from oprd_nb.cli import sweep as command
from oprd_nb.cli.arguments import parse

SHORT = (
    "embedded/student embedded/teacher arithmetic --max_steps 2 --max_completion_length 40 --bf16 False "
    "--per_device_train_batch_size 8 --gradient_accumulation_steps 1 --num_generations 1 --use_cpu True "
    "--save_strategy no --disable_tqdm True --test_limit 12 --samples 1"
).split()

ASKED = ["--rates", "1e-3", "--over", "layers=all,last", "--seeds", "1"]


def sweep(folder, *changes):
    return main(["sweep", *SHORT, "--output_dir", str(folder), *changes])


def plan(*changes):
    args, config = parse("sweep", command.ARGUMENTS, [*SHORT, "--output_dir", "runs/sweep", *changes])
    return command.Plan(args, config.output_dir)


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """A sweep over layers with one seed: three runs."""
    folder = tmp_path_factory.mktemp("sweep")
    assert sweep(folder, *ASKED) == 0
    return folder


@pytest.fixture
def copied(ended, tmp_path):
    return Path(shutil.copytree(ended, tmp_path / "sweep"))


def test_validation_chooses_and_test_is_reported(ended):
    rows = pd.read_csv(ended / "sweep.csv")
    assert rows["split"].tolist() == ["validation", "validation", "test"]
    assert rows["seed"].tolist() == [0, 0, 1]
    assert rows.layers[:2].tolist() == ["all", "last"]
    assert rows.layers[2] == rows.layers[rows.accuracy[:2].idxmax()]
    for row in rows.itertuples():
        summary = json.loads((ended / row.run / "summary.json").read_text())
        assert summary["avg@1"]["value"] == pytest.approx(row.accuracy, abs=1e-5)
        assert "teacher/avg@1" not in summary
    page = (ended / "report.html").read_text()
    assert 'src="http' not in page
    assert "layers: all, last" in page


def test_what_has_ended_is_not_run_again(ended, copied, capsys):
    reported = pd.read_csv(ended / "sweep.csv").run[2]
    (copied / reported / "summary.json").unlink()  # as a stopped run has none
    assert sweep(copied, *ASKED) == 0
    shown = capsys.readouterr().out.splitlines()
    assert ["(was there)" in line for line in shown[:3]] == [True, True, False]
    columns = ["accuracy", "before", "run"]
    tables = [pd.read_csv(folder / "sweep.csv")[columns] for folder in (ended, copied)]
    assert tables[0].equals(tables[1])


@pytest.mark.parametrize("name, before, after", [("max_steps", 2, 3), ("test_limit", 12, 13)])
def test_a_run_with_other_settings_is_not_taken_for_this_one(copied, name, before, after, capsys):
    assert sweep(copied, *ASKED, f"--{name}", str(after)) == 2
    assert f"{name}={after} (it was {before})" in capsys.readouterr().err


def test_the_stored_command_makes_the_run_again(ended, tmp_path):
    folder = ended / pd.read_csv(ended / "sweep.csv").run[0]
    words = json.loads((folder / "about.json").read_text())["command"].split()
    again = tmp_path / "again"
    assert main([*words[1:-1], str(again)]) == 0
    stored = [pd.read_parquet(path / "eval" / "after.parquet") for path in (folder, again)]
    assert stored[0]["response"].tolist() == stored[1]["response"].tolist()


def test_dry_run_prints_a_command_per_run_and_writes_nothing(tmp_path, capsys):
    folder = tmp_path / "sweep"
    asked = ["--methods", "oprd", "opd-full", "--rates", "1e-4", "1e-3", "--dry_run"]
    assert sweep(folder, *asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(line.startswith("oprd train ") for line in lines)
    assert not folder.exists()


@pytest.mark.parametrize(
    "asked, message",
    [
        ([], "nothing to choose from"),
        (["--rates", "fast"], "must be a number"),
        (["--over", "mu"], "must be a setting and its values"),
        (["--over", "seed=1,2"], "--choose_with"),
        (["--over", "leyers=all,last"], "leyers"),
        (["--over", "layers=all,many"], "many"),
        (["--rates", "1e-4", "--seed", "3"], "--seeds"),
        (["--rates", "1e-4", "--methods", "oprd", "nothing"], "method='nothing'"),
        (["--rates", "1e-4", "--validation", "aime24", "--test", "aime24"], "must not be what is reported"),
    ],
)
def test_wrong_requests_are_refused_in_one_line(asked, message, tmp_path, capsys):
    folder = tmp_path / "sweep"
    assert sweep(folder, *asked) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not folder.exists()


def test_a_rate_at_which_training_breaks_down_is_a_row_without_numbers(copied, monkeypatch, capsys):
    def breaks_down(request, config):
        assert config.learning_rate == 10
        raise ValueError("max_skipped=3: step 3 is the last of so many in a row that were skipped")

    monkeypatch.setattr(command, "train", breaks_down)
    assert sweep(copied, *ASKED, "--rates", "1e-3", "10") == 0
    rows = pd.read_csv(copied / "sweep.csv")
    assert rows.accuracy.isna().tolist() == [False, False, True, True, False]
    assert capsys.readouterr().out.count("broke down") == 2


def test_another_error_stops_the_sweep(tmp_path, monkeypatch, capsys):
    def fails(request, config):
        raise ValueError("prompts: none can be read")

    monkeypatch.setattr(command, "train", fails)
    assert sweep(tmp_path, *ASKED) == 2
    assert "prompts: none can be read" in capsys.readouterr().err


def test_values_with_commas_and_values_that_are_the_same():
    cells = plan("--over", "layers=all;1,2", "--rates", "1e-4", "0.0001").choosing()
    assert [cell.request.layers for cell in cells] == ["all", "1,2"]
    assert {cell.config.learning_rate for cell in cells} == {1e-4}


def test_sets_without_validation_problems_are_measured_whole():
    sets = plan("--rates", "1e-4", "--validation", "words").sets
    assert sets["validation"] == {"test": "words", "test_split": "validation"}
    assert sets["test"] == {"test": "arithmetic", "test_split": "test"}
