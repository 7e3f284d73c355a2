"""README's commands of `oprd`, with embedded models: with few steps, and with --slow as printed."""

import re
import shlex
from pathlib import Path

import pytest

from oprd_nb.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text()
# The embedded models of the same and of another width, as the pairs that README names.
EMBEDDED = {
    "Qwen/Qwen3-0.6B": "embedded/student",
    "Qwen/Qwen3-1.7B": "embedded/teacher_wide",
    "dapo": "arithmetic",
    "aime24": "arithmetic",
}
PAPER = ["--student", "embedded/student", "--teacher", "embedded/teacher", "--prompts", "arithmetic"]
FEW = {
    "train": "--max_steps 2 --save_steps 2 --per_device_train_batch_size 4 --gradient_accumulation_steps 2 "
    "--max_completion_length 40 --samples 1 --limit 64 --disable_tqdm true",
    "sweep": "--methods oprd --rates 1e-3 --seeds 1 --max_steps 2 --per_device_train_batch_size 4 "
    "--samples 1 --test_limit 12 --disable_tqdm true",
    "bridge": "--limit 64 --max_new_tokens 40",
    "probe": "--limit 12",
    "eval": "--samples 1 --limit 12",
}


def commands():
    """Each command line of README that begins with `oprd`, in its order."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("oprd ")]


def is_small(argv):
    """Whether a command is about embedded models already."""
    return any(word.startswith("embedded/") or word.startswith("runs/mine") for word in argv)


def prepared(argv, as_printed):
    """A command with embedded names, and few steps unless it runs as it is printed."""
    embedded = [EMBEDDED.get(word, word) for word in argv]
    if "paper" in argv:
        embedded += PAPER
    if as_printed and is_small(argv):
        return embedded
    return embedded + FEW.get(argv[0], "").split()


def run_all(chosen, as_printed, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for argv in chosen:
        code = main(prepared(argv, as_printed))
        assert code == 0, (argv, capsys.readouterr().err)


def test_readme_names_commands():
    names = {argv[0] for argv in commands()}
    assert names >= {"probe", "train", "sweep", "eval", "report", "bridge", "export"}
    assert not any("--use_cpu" in argv or "--bf16" in argv for argv in commands())


def test_readmes_commands_run(tmp_path, monkeypatch, capsys):
    run_all(commands(), False, tmp_path, monkeypatch, capsys)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert (tmp_path / "runs" / "two-stages" / "1-bridge" / "summary.json").is_file()
    assert (tmp_path / "my-model" / "config.json").is_file()


@pytest.mark.slow
def test_readmes_commands_run_as_printed(tmp_path, monkeypatch, capsys):
    chosen = [argv for argv in commands() if is_small(argv) and argv[0] != "sweep"]  # which takes an hour
    run_all(chosen, True, tmp_path, monkeypatch, capsys)
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
