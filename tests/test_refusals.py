"""A wrong value from outside is answered in one line that names it and the way out, with exit code 2."""

import json
import os
import subprocess
import sys

import pandas as pd
import pytest

from oprd_nb import __version__
from oprd_nb.cli import main
from oprd_nb.models.loading import locate_model
from oprd_nb.runs import read_run

PAIR = ["embedded/student", "embedded/teacher", "arithmetic"]
TRAIN = ["train", *PAIR, "--output_dir", "run"]
EVAL = ["eval", "embedded/student", "--task", "arithmetic"]
BRIDGE = ["bridge", "embedded/student", "embedded/teacher_wide", "arithmetic"]

OPTIONS = [
    # command, wrong settings, what the message names, the way out
    (["demo"], "--steps -1", "steps=-1", "between 1 and"),
    (["demo"], "--seed -1", "seed=-1", "between 0 and 4294967295"),
    (TRAIN, "--max_steps -5", "max_steps=-5", "at least 1, or -1"),
    (TRAIN, "--max_steps 0", "max_steps=0", "at least 1, or -1"),
    (TRAIN, "--dtype foo", "dtype='foo'", "use one of ['auto'"),
    (TRAIN, "--learning_rate 1e30", "learning_rate=1e+30", "between 0 and 100"),
    (TRAIN, "--learning_rate nan", "learning_rate=nan", "between 0 and 100"),
    (TRAIN, "--learning_rate -1e-5", "learning_rate=-1e-05", "between 0 and 100"),
    (TRAIN, "--temperature 0", "temperature=0.0", "between 0.001"),
    (TRAIN, "--weight_decay inf", "weight_decay=inf", "between 0 and 100"),
    (TRAIN, "--report_to wandb", "report_to='wandb'", "pip install wandb"),
    (TRAIN, "--report_to wand", "report_to='wand'", "did you mean wandb?"),
    (TRAIN, "--limit -1", "limit=-1", "at least 0"),
    (TRAIN, "--method opd-full --mu -3", "mu=-3", "between 0 and"),
    (TRAIN, "--method oprdd", "method='oprdd'", "did you mean oprd?"),
    (TRAIN, "--teacher_device foo", "teacher_device='foo'", "use auto, split"),
    (TRAIN, "--quantize int4", "quantize='int4'", "did you mean int8?"),
    (TRAIN, "--sampler vlm", "sampler='vlm'", "did you mean vllm?"),
    (TRAIN, "--lr_scheduler_type cosin", "lr_scheduler_type='cosin'", "did you mean cosine?"),
    (TRAIN, "--lr_scheduler_kwargs [1,2", "lr_scheduler_kwargs='[1,2'", "names with values"),
    (TRAIN, "--method bridge --bridge nowhere", "nowhere/bridge.safetensors", "oprd bridge"),
    (TRAIN, "--replay nowhere", "nowhere", "Rollouts.save"),
    (TRAIN, "--learnin_rate 1", "--learnin_rate", "did you mean --learning_rate?"),
    (TRAIN, "--max_steps many", "max_steps='many'", "must be a whole number"),
    (TRAIN, "--resume maybe", "resume", "expected one of yes/no"),
    (TRAIN, "--limit 5 6", "'6'", "one value too many"),
    (TRAIN, "--lim 5", "--lim:", "did you mean --limit?"),
    (EVAL, "--device foo", "device='foo'", "use auto, split"),
    (EVAL, "--batch_size 0", "batch_size=0", "between 1 and"),
    (EVAL, "--samples 0", "samples=0", "between 1 and"),
    (EVAL, "--temperature -1", "temperature=-1.0", "between 0 and 100"),
    (EVAL, "--temperature nan", "temperature=nan", "between 0 and 100"),
    (EVAL, "--max_new_tokens 0", "max_new_tokens=0", "between 1 and"),
    (["eval"], "runs/nowhere --task arithmetic", "model='runs/nowhere'", "give a model folder"),
    (BRIDGE, "--dtype foo", "dtype='foo'", "use one of ['auto'"),
    (BRIDGE, "--steps 0", "steps=0", "between 1 and"),
    (["probe", *PAIR], "--device cuda:77", "device='cuda:77'", "use auto, split"),
    (["probe", *PAIR], "--layers first", "layers='first'", "use"),
    (["bench", "loss-path"], "--device foo", "device='foo'", "use auto"),
    (["bench", "loss-path"], "--rounds 0", "rounds=0", "between 1 and"),
    (["bench"], "speed", "what='speed'", "use one of"),
    (["report"], "nowhere", "run='nowhere'", "name a run folder"),
    (["export"], "nowhere", "nowhere", "give"),
    (["trian"], "", "'trian'", "did you mean train?"),
]


def refusal(argv, capsys):
    """The one line with which a command refuses its arguments."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("oprd")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


@pytest.mark.parametrize("command, wrong, named, way_out", OPTIONS, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_is_one_line(command, wrong, named, way_out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = refusal([*command, *wrong.split()], capsys)
    assert named in line and way_out in line, line
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for name in ("runs/first", "models/tiny", "./model", "a/b/c", "model/", "a\\b"):
        with pytest.raises(ValueError, match="there is no such folder"):
            locate_model(name)
    assert locate_model("some-org/some-model") == "some-org/some-model"


def samples(**columns):
    return pd.DataFrame({"problem": [0, 1], "sample": [0, 0], "correct": [True, False]} | columns)


def damaged_runs(folder):
    """Run folders that are wrong in one place each, and what the message must name."""
    laughs = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
    laughs += "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    texts = {
        "config.yaml": {
            "a bomb": ("method: oprd\n" + laughs, "aliases"),
            "deep": ("method: " + "[" * 3000, "nested"),
            "code": ("method: !!python/name:os.system", "config.yaml is damaged"),
            "a list": ("- oprd", "is a list"),
            "method a list": ("method: [oprd]", "method=['oprd']"),
            "mu text": ("method: oprd\nmu: much", "mu='much'"),
            "a number as name": ("1: 2\nmethod: oprd", "1 is no name"),
            "no text": (b"\xff\xfe\x00\x01", "config.yaml is damaged"),
            "large": ("#" * 1_100_000 + "\nmethod: oprd", "bytes"),
        },
        "about.json": {
            "deep facts": ('{"label":' * 100_000, "about.json is damaged"),
            "torn": ('{"label": "OP', "about.json is damaged"),
            "label a list": ('{"label": ["OPRD"]}', "label=['OPRD']"),
            "versions text": ('{"versions": "2.13"}', "versions='2.13'"),
            "problems text": ('{"validation_problems": "many"}', "validation_problems='many'"),
        },
        "metrics.jsonl": {
            "torn line": ('{"step": 1, "lo\n{"step": 2}\n', "line 1"),
            "deep line": ('{"step": 1}\n' + '{"a":' * 100_000 + "\n", "line 2"),
            "text value": ('{"step": 1, "loss": "small"}\n', "line 1"),
            "list value": ('{"step": 1, "loss": [1]}\n', "line 1"),
            "text step": ('{"step": "one"}\n', "line 1"),
            "endless step": ('{"step": 1e400}\n', "line 1"),
            "large number": ('{"step": 1, "loss": 1' + "0" * 400 + "}\n", "line 1"),
            "no object": ("[1]\n", "line 1"),
            "no text": (b'{"step": 1}\n\xff\xfe\n', "is no text"),
        },
        "summary.json": {
            "seconds text": ('{"seconds": "long"}', "seconds='long'"),
            "seconds list": ('{"seconds": [1]}', "seconds=[1]"),
            "value text": ('{"seconds": {"value": "long"}}', "seconds='long'"),
            "a list": ("[]", "summary.json is damaged"),
        },
        "eval/after.parquet": {
            "no parquet": (b"PAR1", "after.parquet cannot be read"),
            "empty": (b"", "after.parquet cannot be read"),
        },
    }
    runs = {}
    for file, cases in texts.items():
        for name, (content, named) in cases.items():
            path = folder / f"{file.split('.')[0].replace('/', '-')} {name}" / file
            path.parent.mkdir(parents=True)
            run = path.parent.parent if "eval" in file else path.parent
            if file != "config.yaml":
                (run / "config.yaml").write_text("method: oprd\n")
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
            runs[run] = named
    for name, table in {
        "no grades": samples().drop(columns="correct"),
        "grades in words": samples(correct=["yes", "no"]),
        "lengths in words": samples(tokens=["long", "short"]),
    }.items():
        run = folder / f"samples {name}"
        (run / "eval").mkdir(parents=True)
        (run / "config.yaml").write_text("method: oprd\n")
        table.to_parquet(run / "eval" / "after.parquet")
        runs[run] = "eval/after.parquet"
    return runs


def test_damaged_run_folders_are_refused(tmp_path, capsys):
    for run, named in damaged_runs(tmp_path).items():
        line = refusal(["report", str(run), "--out", str(tmp_path / "page.html")], capsys)
        assert named in line, (run.name, line)
        assert run.name in line, line
        assert len(line) < 600
    assert not (tmp_path / "page.html").exists()


def test_a_log_that_is_still_written_is_read(tmp_path):
    (tmp_path / "config.yaml").write_text("method: oprd\n")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo'
    )
    assert read_run(tmp_path).metrics["step"].tolist() == [1, 2]


def test_the_package_is_a_command_and_names_its_version(tmp_path, capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"oprd_nb {__version__}\n"
    command = [sys.executable, "-m", "oprd_nb"]
    done = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, cwd=tmp_path, env=os.environ
    )
    assert done.returncode == 0 and done.stdout == f"oprd_nb {__version__}\n"


def test_an_error_that_no_check_foresaw_is_one_line_and_keeps_its_traceback(monkeypatch, capsys):
    def broken(args):
        raise RuntimeError("lost\nits way")

    monkeypatch.setattr("oprd_nb.cli.report.run", broken)
    assert main(["report", "run"]) == 1
    line = capsys.readouterr().err
    assert line.startswith("oprd report: RuntimeError: lost its way") and line.count("\n") == 1
    with open(line.rsplit("where it happened: ")[1].strip(")\n")) as file:
        assert "Traceback" in file.read()


def test_a_name_that_json_allows_twice_is_read_as_the_last(tmp_path):
    (tmp_path / "config.yaml").write_text("method: oprd\n")
    (tmp_path / "about.json").write_text(json.dumps({"label": "A"})[:-1] + ', "label": "B"}')
    assert read_run(tmp_path).label == "B"
