"""Settings from files and presets, help that fits two screens, and a run that is repeated from its folder."""

import json

import pytest
import yaml

from oprd_nb.cli import main
from oprd_nb.cli.arguments import parse
from oprd_nb.cli.files import PRESETS, with_files
from oprd_nb.cli.train import ARGUMENTS

PAIR = ["embedded/student", "embedded/teacher", "arithmetic"]
SHORT = "--max_steps 2 --max_completion_length 40 --per_device_train_batch_size 8 --use_cpu true"
SHORT += " --save_strategy no --gradient_accumulation_steps 1 --learning_rate 1e-3 --disable_tqdm true"


def parsed(*argv):
    return parse("train", ARGUMENTS, list(argv))


def losses(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]


def test_a_run_folders_settings_repeat_the_run(tmp_path, capsys):
    """The loss of the first step is the same, bit by bit, and so is every later one."""
    first, second = tmp_path / "first", tmp_path / "second"
    asked = f"--method opd-full --mu 2 --layers odd --limit 32 --seed 7 --lora 4 {SHORT}"
    assert main(["train", *PAIR, *asked.split(), "--output_dir", str(first)]) == 0
    settings = yaml.safe_load((first / "config.yaml").read_text())
    assert settings["layers"] == "odd" and settings["limit"] == 32 and settings["lora"] == 4
    assert "output_dir" not in settings
    assert main(["train", "--config", str(first / "config.yaml"), "--output_dir", str(second)]) == 0
    assert losses(first) == losses(second) and len(losses(first)) == 2
    assert yaml.safe_load((second / "config.yaml").read_text()) == settings
    capsys.readouterr()
    assert main(["train", "--config", str(first / "config.yaml")]) == 2
    assert "output_dir: not given" in capsys.readouterr().err


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("learning_rate: 2e-4\nlora: 8\nbf16: false\nlr_scheduler_kwargs:\n  num_cycles: 2\n")
    request, config = parsed(*PAIR, "--preset", "laptop", "--config", str(file), "--lora", "2")
    assert request.lora == 2 and config.learning_rate == 2e-4 and not config.bf16
    assert config.max_completion_length == PRESETS["laptop"]["max_completion_length"]
    assert config.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_settings(preset):
    request, config = parsed(*PAIR, "--preset", preset)
    for name, value in PRESETS[preset].items():
        if name not in ("student", "teacher", "prompts"):
            assert getattr(request if hasattr(request, name) else config, name) == value
    assert request.student == "embedded/student"


def test_responses_are_short_by_default_and_the_papers_under_its_preset():
    assert parsed(*PAIR)[1].max_completion_length == 1024
    request, config = parsed("--preset", "paper")
    assert config.max_completion_length == 16384 and "Qwen-1.5B" in request.student


WRONG = {
    "lerning_rate: 1e-4": "'lerning_rate' is no setting; did you mean learning_rate?",
    "learning_rate: fast": "learning_rate='fast': must be a number",
    "learning_rate: .nan": "learning_rate=nan: must be between 0 and 100",
    "limit: 3.5": "limit='3.5': must be a whole number",
    "limit: [1, 2]": "'2': one value too many",
    "method: magic": "method='magic': use one of",
    "bf16: 2020-01-01": "bf16: is a date",
    "student: !!python/name:os.system": "run.yaml is damaged",
    "- student": "run.yaml is damaged: it is a list",
    "seed: {a: 1}": "seed='{\"a\": 1}': must be a whole number",
    "a: &a [x]\n" + "".join(f"k{i}: *a\n" for i in range(30)): "more than 20 aliases",
    "[" * 200: "nested more than 12 deep",
    "#" * 1_100_000: "more than 1,000,000 bytes",
}


@pytest.mark.parametrize("text, named", WRONG.items(), ids=lambda text: text[:20])
def test_a_wrong_file_is_one_line(text, named, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(text)
    assert main(["train", *PAIR, "--config", "run.yaml", "--output_dir", "out"]) == 2
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error, error
    assert not (tmp_path / "out").exists()


def test_files_that_are_not_there():
    for argv, named in (
        (["--config", "nowhere.yaml"], "config='nowhere.yaml': there is no such file"),
        (["--config"], "config: needs a value"),
        (["--preset", "lapto"], "did you mean laptop?"),
    ):
        with pytest.raises(ValueError, match=named):
            with_files(argv, [])


def test_help_fits_two_screens_and_all_of_it_is_there(capsys):
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            main(["train", flag])
        assert stop.value.code == 0
        shown = capsys.readouterr().out
        if flag == "--help":
            assert len(shown.splitlines()) <= 90
            assert "STUDENT TEACHER PROMPTS" in shown and "oprd, opd-full, opd-sampled" in shown
            assert "--hub_token" not in shown
        else:
            assert "--hub_token" in shown


def test_the_papers_run_is_looked_at_without_weights_or_network(monkeypatch, capsys):
    monkeypatch.delenv("OPRD_DATA", raising=False)
    assert main(["train", "--preset", "paper", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "28 layers, 1536 wide" in shown and "500 of 16 responses to 8 prompts" in shown
    assert "fits on a card of 48 GB" in shown and "prompts: dapo, not on this machine" in shown


def test_a_dry_run_shows_what_is_asked_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    asked = ["--dry_run", "--max_completion_length", "40", "--teacher_prompt", "1+1=2{}"]
    assert main(["train", *PAIR, *asked]) == 0
    shown = capsys.readouterr().out
    assert "student is asked: '<|user|>59+63+15<|end|><|assistant|>'" in shown
    assert "teacher is asked: '<|user|>1+1=259+63+15<|end|><|assistant|>'" in shown
    assert "the 20,000 prompts are seen 0.2 times" in shown and not list(tmp_path.iterdir())


def test_a_check_loads_everything_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *PAIR, "--check", *SHORT.split()]) == 0
    assert "everything that a run checks" in capsys.readouterr().out
    assert main(["train", *PAIR, "--check", "--layers", "9", *SHORT.split()]) == 2
    assert "layers='9'" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_was_asked_is_printed_and_stored(tmp_path, capsys):
    assert main(["train", *PAIR, "--output_dir", str(tmp_path / "run"), *SHORT.split()]) == 0
    text = "<|user|>59+63+15<|end|><|assistant|>"
    assert f"student and teacher are asked: {text!r}" in capsys.readouterr().out
    about = json.loads((tmp_path / "run" / "about.json").read_text())
    assert about["asked"] == {"student": text, "teacher": text}
