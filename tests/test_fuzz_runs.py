"""A seeded corpus of damaged run folders: each is read, or refused in one line that names it.

An eighth runs always, all of it with --slow.
"""

import json
import random
import shutil

import pandas as pd
import pytest
import yaml
from fuzzing import (
    FOREIGN,
    LAUGHS,
    Case,
    check_none,
    damaged_bytes,
    damaged_json,
    damaged_table,
    flaw,
    reader_flaw,
)

from oprd_nb.explore.rollouts import answers_of
from oprd_nb.explore.scores import save_tokens
from oprd_nb.runs.synthetic import synthetic_run

YAML = {
    "a bomb": LAUGHS,
    "deep": "a: " + "[" * 3000,
    "deep blocks": "".join(" " * depth + f"k{depth}:\n" for depth in range(500)),
    "code": "a: !!python/object/apply:os.system [echo]",
    "a tag": "a: !unknown 1",
    "a list": "- oprd",
    "a text": "oprd",
    "numbers as names": "1: 2",
    "a date as a name": "2020-01-01: 2",
    "tabs": "a:\n\t- b",
    "unclosed": "a: [1, 2",
    "two documents": "a: 1\n---\nb: 2",
    "large": "#" * 1_100_000,
    "itself": "a: &a [*a]",
}


def corpus(folder):
    """Every case, in a fixed order, from the files of a good run."""
    rng = random.Random(171)
    cases = []
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        cases += damaged_bytes(str(path.relative_to(folder)), path.read_bytes(), rng)
    settings = yaml.safe_load((folder / "config.yaml").read_text())
    for key in settings:
        for value in rng.sample([value for value in FOREIGN if value != "\ud800"], 4):
            text = yaml.safe_dump(settings | {key: value})
            cases.append(Case(f"config.yaml: {key} {str(value)[:20]!r}", "config.yaml", text.encode()))
    for name, text in YAML.items():
        refused = None if name in ("itself", "a date as a name") else True
        cases.append(Case(f"config.yaml: {name}", "config.yaml", f"{text}\nmethod: oprd\n".encode(), refused))
    cases += damaged_json("about.json", json.loads((folder / "about.json").read_text()), rng)
    cases += damaged_json("summary.json", {"seconds": 1, "avg@1": {"value": 1, "low": 0, "high": 1}}, rng)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    middle = json.loads(lines[5])
    for key in middle:
        for value in rng.sample(FOREIGN, 2):
            line = json.dumps(middle | {key: value})
            text = "\n".join([*lines[:5], line, *lines[6:], ""])
            cases.append(Case(f"metrics.jsonl: {key} {str(value)[:20]!r}", "metrics.jsonl", text.encode()))
    for name, line in {
        "torn": lines[5][:30],
        "deep": '{"a":' * 100_000,
        "a list": "[1, 2]",
        "two": lines[5] + lines[6],
        "a text": '"loss"',
        "no step": '{"loss": 1.0}',
        "step twice": '{"step": 1, "step": "two"}',
    }.items():
        text = "\n".join([*lines[:5], line, *lines[6:], ""])
        cases.append(Case(f"metrics.jsonl: line {name}", "metrics.jsonl", text.encode(), refused=True))
    for name in ("before", "after"):
        file = f"eval/{name}.parquet"
        cases += damaged_table(file, pd.read_parquet(folder / file), rng)
    rng.shuffle(cases)
    return cases


def check(tmp_path, capsys, every):
    good = synthetic_run(tmp_path / "good", "oprd", steps=12, problems=12)
    cases = corpus(good)
    assert len(cases) >= 200
    page = tmp_path / "page.html"
    wrong = []
    for case in cases[::every]:
        run = tmp_path / "damaged"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(good, run)
        case.write(run)
        found = flaw(["report", str(run), "--out", str(page)], capsys, "damaged", case.refused)
        left = sorted(path.name for path in tmp_path.iterdir())
        if found or left not in (["damaged", "good"], ["damaged", "good", "page.html"]):
            wrong.append((case.name, found, left))
        page.unlink(missing_ok=True)
    check_none(wrong)


def test_an_eighth_of_the_damaged_runs(tmp_path, capsys):
    check(tmp_path, capsys, 8)


@pytest.mark.slow
def test_all_damaged_runs(tmp_path, capsys):
    check(tmp_path, capsys, 1)


def scores_of(samples):
    """A table of made-up scores of a few responses."""
    rows = [
        {"problem": sample.problem, "sample": sample.sample, "position": position, "text": "a"}
        for sample in samples.head(6).itertuples()
        for position in range(sample.tokens)
    ]
    return pd.DataFrame(rows).assign(kl=0.5, distance=0.1, offset=0)


def test_damaged_scores_of_tokens(tmp_path):
    run = synthetic_run(tmp_path / "run", "oprd", steps=4, problems=12)
    table = scores_of(pd.read_parquet(run / "eval" / "after.parquet"))
    path = save_tokens(table, run, "after")
    assert len(answers_of(run).tokens["after"]) == len(table)
    rng = random.Random(172)
    file = "tokens/after.parquet"
    cases = [*damaged_table(file, table, rng), *damaged_bytes(file, path.read_bytes(), rng)]
    wrong = []
    for case in cases:
        case.write(run)
        found = reader_flaw(lambda: answers_of(run), str(run), case.refused)
        if found:
            wrong.append((case.name, found))
    assert len(cases) > 30
    check_none(wrong)
