"""A seeded corpus of damaged problem files and settings files: each is read, or refused in one line.

An eighth runs always, all of it with --slow.
"""

import csv
import io
import json
import random

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fuzzing import FOREIGN, LAUGHS, Case, check_none, damaged_bytes, damaged_table, flaw, reader_flaw

from oprd_nb.tasks.loading import load_task

ROWS = [
    {
        "prompt": [{"role": "user", "content": f"What is {n} + {n}?"}],
        "answer": str(2 * n),
        "solution": f"{n} + {n} = {2 * n}",
        "reward_model": {"ground_truth": str(2 * n)},
    }
    for n in range(6)
]
MESSAGES = [
    "text",
    7,
    None,
    [],
    ["text"],
    [None],
    [[{"role": "user", "content": "a"}]],
    [{"role": "user"}],
    [{"content": "a"}],
    [{"role": 7, "content": "a"}],
    [{"role": "user", "content": None}],
    [{"role": "user", "content": 7}],
    [{"role": "user", "content": {"text": "a"}}],
    [{"role": "user", "content": [{"type": "image", "url": "a.png"}]}],
    [{"role": "god", "content": "a"}],
    [{"role": "assistant", "content": "a"}],
    [{"role": "user", "content": ""}],
    {"role": "user", "content": "a"},
]


def text_of(rows, ending):
    """The rows as JSON, JSON lines or CSV."""
    if ending == "json":
        return json.dumps(rows).encode("utf-8", "surrogatepass")
    if ending == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode("utf-8", "surrogatepass")
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(
        {name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()}
        for row in rows
    )
    return text.getvalue().encode("utf-8", "surrogatepass")


def parquet(**columns):
    """A parquet file of these columns, which pandas could not write as they are."""
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue().to_pybytes()


def corpus():
    """Every case, in a fixed order."""
    rng = random.Random(173)
    cases = []
    for ending in ("json", "jsonl", "csv"):
        file = f"problems.{ending}"
        cases += damaged_bytes(file, text_of(ROWS, ending), rng)
        for key in ROWS[0]:
            for value in rng.sample(FOREIGN, 8):
                rows = [*ROWS[:3], ROWS[3] | {key: value}, *ROWS[4:]]
                cases.append(Case(f"{file}: {key} {str(value)[:20]!r}", file, text_of(rows, ending)))
            rows = [{name: value for name, value in row.items() if name != key} for row in ROWS]
            if ending != "csv":
                cases.append(Case(f"{file}: without {key}", file, text_of(rows, ending)))
        for value in MESSAGES:
            rows = [*ROWS[:3], ROWS[3] | {"prompt": value}, *ROWS[4:]]
            cases.append(Case(f"{file}: prompt {str(value)[:40]!r}", file, text_of(rows, ending)))
    for name, text in {
        "deep": "[" * 100_000,
        "deep objects": '{"a":' * 100_000,
        "names twice": '[{"prompt": "a", "prompt": "b", "answer": "1"}]',
        "number": "7",
        "rows are numbers": "[1, 2]",
        "a huge number": '[{"prompt": "a", "answer": ' + "9" * 5000 + "}]",
        "surrogates": '[{"prompt": "\\ud800", "answer": "1"}]',
    }.items():
        refused = None if name in ("a huge number", "surrogates") else True
        cases.append(Case(f"problems.json: {name}", "problems.json", text.encode(), refused))
    for name, text in {
        "quote": 'prompt,answer\n"a,1\n',
        "ragged": "prompt,answer\na,1,2\n",
        "header only": "prompt,answer\n",
        "column twice": "prompt,prompt\na,1\n",
        "zero bytes": "prompt,answer\na\0b,1\n",
        "a large field": f"prompt,answer\n{'a' * 200_000},1\n",
    }.items():
        refused = None if name in ("zero bytes", "a large field") else True
        cases.append(Case(f"problems.csv: {name}", "problems.csv", text.encode(), refused))
    table = pd.DataFrame(ROWS)
    good = parquet(**{name: [row[name] for row in ROWS] for name in ROWS[0]})
    cases += damaged_bytes("problems.parquet", good, rng)
    cases += damaged_table("problems.parquet", table, rng, each=8)
    cases += [
        Case(f"problems.parquet: {name}", "problems.parquet", content, refused)
        for name, content, refused in [
            ("texts where lists belong", parquet(prompt=["a", ""], answer=["1", "2"]), True),
            ("lists of texts", parquet(prompt=[["a"], ["b"]], answer=["1", "2"]), True),
            ("no rows", parquet(prompt=pa.array([], pa.string()), answer=pa.array([], pa.string())), True),
            ("bytes that are no text", parquet(prompt=[b"\xff", b"\xfe"], answer=["1", "2"]), True),
            ("answers are lists", parquet(prompt=["a", "b"], answer=[["1", "2"], ["3", "4"]]), True),
            ("answers are objects", parquet(prompt=["a", "b"], answer=[{"x": "1"}, {"x": "2"}]), True),
            (
                "a map",
                parquet(prompt=pa.array([[("role", "user")]], pa.map_(pa.string(), pa.string()))),
                True,
            ),
            ("decimals", parquet(prompt=["a"], answer=pa.array([1]).cast(pa.decimal128(22, 2))), None),
            ("dictionary", parquet(prompt=pa.array(["a"]).dictionary_encode(), answer=["1"]), None),
        ]
    ]
    rng.shuffle(cases)
    return cases


CORPUS = corpus()
PAIR = ["embedded/student", "embedded/teacher"]
COMMANDS = {
    "train": ["train", *PAIR, "--output_dir", "run", "--prompts"],
    "probe": ["probe", *PAIR],
    "bridge": ["bridge", *PAIR],
    "eval": ["eval", "embedded/student", "--task"],
}


def check(cases, folder):
    """Each through `load_task`, graded and not."""
    wrong = []
    for case in cases:
        case.write(folder)
        path = folder / case.file
        for need_answers in (False, True):
            read = lambda path=path, need=need_answers: load_task(str(path), need_answers=need)  # noqa: E731
            refused = case.refused if need_answers else None
            found = reader_flaw(read, path.name, refused)
            if found:
                wrong.append((case.name, need_answers, found))
    check_none(wrong)


def test_an_eighth_of_the_damaged_problems(tmp_path):
    assert len(CORPUS) >= 250
    check(CORPUS[::8], tmp_path)


@pytest.mark.slow
def test_all_damaged_problems(tmp_path):
    check(CORPUS, tmp_path)


SETTINGS = {
    "a bomb": LAUGHS,
    "deep": "a: " + "[" * 3000,
    "code": "method: !!python/object/apply:os.system [echo]",
    "a list": "- oprd",
    "no setting": "studnt: embedded/student",
    "two documents": "method: oprd\n---\nteacher: b",
    "no text": b"\xff\xfe\x00",
    "torn": "method: [embedded",
    "steps in words": "max_steps: many",
    "steps in a list": "max_steps: [1, 2]",
    "a mapping": "temperature: {a: 1}",
    "a date": "method: 2020-01-01",
    "rate nan": "learning_rate: .nan",
    "a folder": None,
}


def test_damaged_settings_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "run.yaml"
    wrong = []
    for name, content in SETTINGS.items():
        if content is None:
            path.unlink()
            path.mkdir()
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        found = flaw([*COMMANDS["train"], "arithmetic", "--config", str(path)], capsys)
        if found:
            wrong.append((name, found))
    check_none(wrong)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_reads_problems_refuses_them(command, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    wrong = []
    for case in random.Random(command).sample([case for case in CORPUS if case.refused], 6):
        case.write(tmp_path)
        found = flaw([*COMMANDS[command], case.file], capsys, case.file)
        if found:
            wrong.append((case.name, found))
        (tmp_path / case.file).unlink()
    check_none(wrong)
    assert not list(tmp_path.iterdir())
