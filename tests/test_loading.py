"""Files of problems: five kinds, right or refused in one line that names file, row, column and a way out."""

import csv
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from oprd_nb.tasks import load_task, loading
from oprd_nb.tasks.files import parse_json

KINDS = ("parquet", "jsonl", "json", "csv", "folder")


def user(content):
    return {"role": "user", "content": content}


def write(kind, rows, folder):
    """The rows as a file of this kind. ValueError where this kind cannot hold them."""
    path = folder / ("problems" if kind == "folder" else f"problems.{kind}")
    names = list(dict.fromkeys(name for row in rows for name in row))
    try:
        if kind == "parquet":
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist([dict.fromkeys(names) | r for r in rows]), path
            )
        elif kind == "folder":
            columns = {name: [row.get(name) for row in rows] for name in names}
            datasets.Dataset.from_dict(columns).save_to_disk(path)
    except (pyarrow.ArrowException, TypeError) as error:
        raise ValueError(str(error)) from None
    if kind == "json":
        path.write_text(json.dumps(rows))
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    if kind == "csv":
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            for row in rows:
                cells = [row.get(name) for name in names]
                writer.writerow([c if isinstance(c, str | None) else json.dumps(c) for c in cells])
    return path


GOOD = {
    "text": ({"prompt": "1+1?", "answer": "2"}, "2"),
    "messages": ({"prompt": [user("1+1?")], "answer": "2"}, "2"),
    "parts": (
        {"prompt": [user([{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}])], "answer": "2"},
        "2",
    ),
    "system": ({"prompt": [{"role": "system", "content": "Add."}, user("1+1?")], "answer": "2"}, "2"),
    "number": ({"prompt": "1+1?", "answer": 2}, "2"),
    "zero": ({"prompt": "1-1?", "answer": 0}, "0"),
    "float": ({"prompt": "1/2?", "answer": 0.5}, "0.5"),
    "list of one": ({"prompt": "1+1?", "answer": ["2"]}, "2"),
    "reward_model": ({"prompt": "1+1?", "reward_model": {"ground_truth": "2", "style": "rule"}}, "2"),
    "reward_model as text": ({"prompt": "1+1?", "reward_model": '{"ground_truth": 2}'}, "2"),
    "null ground_truth": ({"prompt": "1+1?", "reward_model": {"ground_truth": None}, "answer": "2"}, "2"),
    "label": ({"prompt": "1+1?", "label": 2}, "2"),
    "final_answer": ({"prompt": "1+1?", "final_answer": "2"}, "2"),
    "null label": ({"prompt": "1+1?", "answer": None, "final_answer": "2"}, "2"),
    "solution with ####": ({"prompt": "1+1?", "answer": "It is 1 more.\n#### 2"}, "2"),
    "no answer": ({"prompt": "1+1?"}, None),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_loads(kind, name, tmp_path):
    row, answer = GOOD[name]
    task = load_task(write(kind, [row], tmp_path))
    assert task.train is None and len(task.test) == 1
    assert task.test[0]["answer"] == answer
    prompt = task.test[0]["prompt"]
    assert prompt[-1] == user(prompt[-1]["content"]) and isinstance(prompt[-1]["content"], str)
    if name == "parts":
        assert prompt == [user("1+1?")]


ONE = {"prompt": "1+1?", "answer": "2"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": "{}"}]}
BAD = {  # rows, options, where, what
    "null prompt": ([ONE, {"prompt": None, "answer": "2"}], {}, "prompt", "is None"),
    "empty text": ([ONE, {"prompt": "", "answer": "2"}], {}, "prompt", "is None|empty"),
    "blank text": ([ONE, {"prompt": "  \n", "answer": "2"}], {}, "prompt", "empty"),
    "no messages": ([{"prompt": [user("1")]}, {"prompt": []}], {}, "prompt", "has no messages"),
    "null content": ([{"prompt": [user("1")]}, {"prompt": [user(None)]}], {}, "prompt", "content is None"),
    "empty content": ([{"prompt": [user("1")]}, {"prompt": [user("")]}], {}, "prompt", "is empty"),
    "number as content": ([{"prompt": [user(1)]}, {"prompt": [user(2)]}], {}, "prompt", "content is 1"),
    "unknown role": ([{"prompt": [{"role": "bot", "content": "1"}]}], {}, "prompt", "role is 'bot'; use"),
    "no role": ([{"prompt": [{"content": "1"}]}], {}, "prompt", "has no 'role'"),
    "null role": ([{"prompt": [user("1"), {"role": None, "content": "1"}]}], {}, "prompt", "has no 'role'"),
    "no content": ([{"prompt": [{"role": "user"}]}], {}, "prompt", "has no 'content'"),
    "other keys": ([{"prompt": [{"from": "human", "value": "1"}]}], {}, "prompt", "has no 'role'"),
    "texts": ([{"prompt": ["1", "2"]}], {}, "prompt", "message 0 is '1'"),
    "ends with the assistant": (
        [{"prompt": [user("1"), {"role": "assistant", "content": "2"}]}], {}, "prompt", "ends with"),
    "ends with a call": ([{"prompt": [user("1"), CALL]}], {}, "prompt", "ends with a message of"),
    "ends with the system": ([{"prompt": [{"role": "system", "content": "1"}]}], {}, "prompt", "ends with"),
    "a picture": ([{"prompt": [user([{"type": "image", "image": "x"}])]}], {}, "prompt", "only parts"),
    "an object": ([{"prompt": user("1")}], {}, "prompt", "give a text, or a list of messages"),
    "a number": ([{"prompt": 11}], {}, "prompt", "is 11; give a text"),
    "Python's text": ([{"prompt": "[{'role': 'user', 'content': '1'}]"}], {}, "prompt", "begins like"),
    "reward_model is text": ([{"prompt": "1", "reward_model": "2 apples"}], {}, "reward_model", "is no JSON"),
    "reward_model is a number": ([{"prompt": "1", "reward_model": 2}], {}, "reward_model", "give an object"),
    "several answers": ([{"prompt": "1", "answer": ["1", "2"]}], {}, "answer", "2 answers; give one text"),
    "answer is an object": ([{"prompt": "1", "answer": {"value": "2"}}], {}, "answer", "give a text"),
    "one answer missing": (
        [ONE, {"prompt": "1", "answer": None}], {"need_answers": True}, "answer", r"no answer \(1 of 2"),
    "blank answer": ([{"prompt": "1", "answer": " "}], {"need_answers": True}, "answer", "has no answer"),
    "no answers": ([{"prompt": "1"}], {"need_answers": True}, "", "no column with answers.*--answer_column"),
    "no prompts": ([{"question": "1"}], {}, "", "no column 'prompt'.*'question'.*--prompt_column"),
    "no such column": ([ONE], {"prompt_column": "promt"}, "", "prompt_column='promt'.*did you mean 'prompt'"),
    "no such answer": ([ONE], {"answer_column": "y"}, "", "answer_column='y'.*no such column"),
    "no such solution": ([ONE], {"solution_column": "y"}, "", "solution_column='y'.*no such column"),
    "one column twice": ([ONE], {"answer_column": "prompt"}, "", "answer_column='prompt'"),
    "no split": ([ONE], {"split": "test"}, "", "split='test'.*has no splits"),
    "bad teacher_prompt": ([ONE | {"teacher_prompt": t} for t in (None, "x")], {}, "teacher_prompt", "None"),
}  # fmt: skip
TYPELESS = {  # in CSV everything is text, and a cell's text is its value
    "no messages",
    "a number",
    "texts",
    "number as content",
    "reward_model is a number",
    "several answers",
    "answer is an object",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_one_line(kind, name, tmp_path):
    rows, options, column, what = BAD[name]
    if kind == "csv" and name in TYPELESS:
        pytest.skip("a table of texts holds no such value")
    path = write(kind, rows, tmp_path)
    with pytest.raises(ValueError, match=what) as error:
        load_task(path, **options)
    message = str(error.value)
    assert "\n" not in message and path.name in message
    if column:
        row = 0 if len(rows) == 1 or name in ("number as content", "bad teacher_prompt") else 1
        assert f"row {row}" in message and f"column {column!r}" in message
        assert ("(line " in message) == (kind in ("jsonl", "csv"))


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows(kind, tmp_path):
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.table({"prompt": []}), tmp_path / "problems.parquet")
        path = tmp_path / "problems.parquet"
    elif kind == "folder":
        datasets.Dataset.from_dict({"prompt": []}).save_to_disk(tmp_path / "problems")
        path = tmp_path / "problems"
    else:
        path = write(kind, [], tmp_path)
    with pytest.raises(ValueError, match="problems.*has no rows"):
        load_task(path)


@pytest.mark.parametrize(
    "name, content, what",
    [
        ("a.parquet", b"PAR1 and then nothing", "cannot be read as parquet"),
        ("a.parquet", b"", "cannot be read as parquet"),
        ("a.json", b"", "cannot be read as JSON"),
        ("a.json", b'[{"prompt": "1"}', "cannot be read as JSON"),
        ("a.json", b'{"prompt": "1"}\n{"prompt": "2"}', "name it .jsonl"),
        ("a.json", b'{"prompt": {"0": "1"}}', "orient='records'"),
        ("a.json", b"3", "is int; write a list"),
        ("a.json", b"[1]", "row 0: is int, not an object"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'[{"prompt": "1", "prompt": "2"}]', "'prompt' occurs twice"),
        ("a.jsonl", b'{"prompt": "1"}\n{"prompt": "2', r"row 1 \(line 2\)"),
        ("a.jsonl", b'[{"prompt": "1"}]', r"row 0 \(line 1\): is list"),
        ("a.jsonl", b'{"prompt": "1", "prompt": "2"}', r"row 0 \(line 1\).*'prompt' occurs twice"),
        ("a.jsonl", b"\xff\xfe1", "write it in UTF-8"),
        ("a.csv", b"prompt,prompt\n1,2\n", "the column 'prompt' twice"),
        ("a.csv", b"prompt,answer\n1,2,3\n", r"row 0 \(line 2\): has 3 cells under 2"),
        ("a.csv", b'prompt\n"1', "cannot be read as CSV"),
        ("a.csv", b"", "has no rows"),
        ("a.tsv", b"prompt,answer\n1,2\n", "has no column 'prompt'"),
        ("a.xlsx", b"1", "ends with '.xlsx'"),
        ("folder/readme.md", b"1", "a folder that `datasets` did not save"),
        ("folder/state.json", b"{}", "cannot be read by `datasets`"),
    ],
)
def test_damaged_files(name, content, what, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=what) as error:
        load_task(path.parent if name.startswith("folder") else path)
    assert "\n" not in str(error.value)


def test_a_parquet_with_a_column_twice(tmp_path):
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["1"]), pyarrow.array(["2"])], names=["prompt", "prompt"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="the column 'prompt' twice"):
        load_task(tmp_path / "a.parquet")


def test_keys_of_messages_are_kept(tmp_path):
    tool = {"role": "tool", "content": "2", "tool_call_id": "a"}
    path = write("jsonl", [{"prompt": [user("1+1?") | {"name": "Ada"}, CALL, tool]}], tmp_path)
    prompt = load_task(path).test[0]["prompt"]
    assert prompt[0]["name"] == "Ada" and prompt[1]["tool_calls"] == CALL["tool_calls"]
    assert prompt[1]["content"] is None and prompt[2]["tool_call_id"] == "a"


def test_arguments_of_several_kinds_are_refused(tmp_path):
    calls = [CALL | {"tool_calls": [{"name": "add", "arguments": {"a": a}}]} for a in (1, "x")]
    path = write("jsonl", [{"prompt": [user("1"), call, user("2")]} for call in calls], tmp_path)
    with pytest.raises(ValueError, match="tool calls as JSON text") as error:
        load_task(path)
    assert "\n" not in str(error.value)


def test_columns_that_are_named(tmp_path):
    path = write("csv", [{"q": "1+1?", "a": 2, "cot": "1 and 1"}], tmp_path)
    task = load_task(path, "q", "a", "cot", system="Add.")
    assert task.test[0] == {
        "prompt": [{"role": "system", "content": "Add."}, user("1+1?")],
        "answer": "2",
        "solution": "1 and 1",
    }


def test_a_prompt_for_the_teacher_is_kept(tmp_path):
    path = write("jsonl", [ONE | {"teacher_prompt": "1+1? It is 2."}], tmp_path)
    assert load_task(path).test[0]["teacher_prompt"] == [user("1+1? It is 2.")]


def test_a_folder_with_splits(tmp_path):
    splits = {
        name: datasets.Dataset.from_list([ONE] * n) for n, name in enumerate(["train", "dev", "test", "x"], 1)
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "sums")
    task = load_task(tmp_path / "sums")
    assert {name: len(rows) for name, rows in task.splits().items()} == {
        "train": 1,
        "validation": 2,
        "test": 3,
    }
    assert len(load_task(tmp_path / "sums", split="x").test) == 4
    with pytest.raises(ValueError, match="split='y'.*'train', 'dev', 'test', 'x'"):
        load_task(tmp_path / "sums", split="y")
    datasets.DatasetDict({"a": splits["x"], "b": splits["x"]}).save_to_disk(tmp_path / "other")
    with pytest.raises(ValueError, match="has the splits.*--split"):
        load_task(tmp_path / "other")


@pytest.mark.parametrize("name", ["./x", "/x/y", "runs/a/b", "x.parquet", "x.json", "~/x", "a\\b"])
def test_a_path_that_is_not_there_is_never_looked_up_on_the_hub(name, monkeypatch):
    monkeypatch.setattr(loading, "from_hub", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_task(name)


def test_the_hub_is_asked_for_a_configuration_and_a_split(monkeypatch):
    asked = []

    def hub(name, configuration, split):
        asked.append((name, configuration, split))
        rows = datasets.Dataset.from_list([ONE])
        return rows if split else datasets.DatasetDict({"train": rows, "test": rows})

    monkeypatch.setattr(loading, "_hub_reason", lambda _: None)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    both = load_task("own/set", configuration="main")
    assert list(both.splits()) == ["train", "test"] and both.name == "set"
    assert list(load_task("own/set", split="train").splits()) == ["test"]
    assert asked == [("own/set", "main", None), ("own/set", None, "train")]


def test_names_that_mean_nothing():
    for name in ("gsm9k", "", "a b"):
        with pytest.raises(ValueError, match="unknown; use one of.*aime24.*arithmetic.*words"):
            load_task(name)
    with pytest.raises(ValueError, match="cannot load 'nobody/nothing' from the hub"):
        load_task("nobody/nothing")


def test_tasks_made_here():
    words = load_task("words", split="validation", system="Be brief.")
    assert list(words.splits()) == ["test"]
    assert words.test[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert len(words.test[0]["prompt"]) == 2 and words.max_new_tokens == 48
    with pytest.raises(ValueError, match="prompt_column='q'.*columns of its own"):
        load_task("arithmetic", "q")
    with pytest.raises(ValueError, match="configuration='q'.*has none"):
        load_task("arithmetic", configuration="q")
    with pytest.raises(ValueError, match="split='q'.*'train', 'validation', 'test'"):
        load_task("arithmetic", split="q")


def test_json_without_a_value():
    assert parse_json('[NaN, Infinity, "x"]') == [None, None, "x"]
