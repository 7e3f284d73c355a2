"""A seeded corpus of wrong options over all commands: one line with the setting's name each, and no file.

An eighth runs always, all of it with --slow.
"""

import random
from dataclasses import fields
from importlib import import_module

import pytest

from oprd_nb.cli import main
from oprd_nb.cli.arguments import LIMITS
from oprd_nb.training import config as run_settings

BASE = {
    "demo": [],
    "probe": ["embedded/student", "embedded/teacher", "arithmetic"],
    "bridge": ["embedded/student", "embedded/teacher_wide", "arithmetic"],
    "train": ["embedded/student", "embedded/teacher", "arithmetic", "--output_dir", "run"],
    "eval": ["embedded/student", "--task", "arithmetic"],
    "bench": ["loss-path"],
}
WORDS = ["", "foo", "nan", "NaN", "-nan", "[1]", "{}", "1,5", "0x10", "1e", "--", "a\nb", "ü", "1 2", "None"]
NUMBERS = ["-1", "-1e-9", "-inf", "-1e400", "nan"]


def misspelt(name, rng):
    """The name with two neighbouring letters exchanged, or one left away."""
    at = rng.randrange(1, len(name) - 1)
    if rng.random() < 0.5 or name[at] == name[at + 1]:
        return name[:at] + name[at + 1 :]
    return name[:at] + name[at + 1] + name[at] + name[at + 2 :]


def corpus():
    """(command, arguments, the setting that the message names), in a fixed order."""
    rng = random.Random(17)
    cases = []
    for command, base in BASE.items():
        types = import_module(f"oprd_nb.cli.{command}").ARGUMENTS
        limits = LIMITS | (run_settings._LIMITS if command == "train" else {})
        for setting in (setting for kind in types for setting in fields(kind)):
            name = setting.name
            if name in limits:
                cases += [(command, [*base, f"--{name}={value}"], name) for value in NUMBERS]
                cases += [(command, [*base, f"--{name}={word}"], name) for word in rng.sample(WORDS, 3)]
            if "choices" in setting.metadata:
                cases.append((command, [*base, f"--{name}=no-such-choice"], name))
            if len(name) > 4 and (name in limits or "choices" in setting.metadata):
                cases.append((command, [*base, f"--{misspelt(name, rng)}", "1"], "--"))
    rng.shuffle(cases)
    return cases


CORPUS = corpus()


def check(cases, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    wrong = []
    for command, argv, name in cases:
        code = main([command, *argv])
        error = capsys.readouterr().err
        one_line = error.count(f"oprd {command}: ") == 1 and error.count("\n") == 1
        if code != 2 or not one_line or name not in error or list(folder.iterdir()):
            wrong.append((command, argv[len(BASE[command]) :], code, error[:200]))
    assert not wrong, (len(wrong), wrong[:10])


def test_the_corpus_is_large():
    assert len(CORPUS) >= 400


def test_an_eighth_of_the_corpus(tmp_path, monkeypatch, capsys):
    check(CORPUS[::8], tmp_path, monkeypatch, capsys)


@pytest.mark.slow
def test_the_whole_corpus(tmp_path, monkeypatch, capsys):
    check(CORPUS, tmp_path, monkeypatch, capsys)
