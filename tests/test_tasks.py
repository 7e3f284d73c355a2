"""Splits that never leak, files that are refused in one line, and grades that are right and bounded."""

import os
import threading
import time

import datasets
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd_nb.tasks import grading, loading
from oprd_nb.tasks.grading import GradingProcess, extract_answer, grade, grade_all, quick_verdict
from oprd_nb.tasks.loading import KNOWN, load_task
from oprd_nb.tasks.problems import (
    INSTRUCTION,
    Task,
    arithmetic,
    contamination,
    sample_problems,
    solve,
    split_of,
)

RIGHT = [  # (in the box, reference)
    (r"\frac{1}{2}", r"\frac12"),
    (r"\dfrac{3}{4}", "0.75"),
    ("1/2", r"\frac{1}{2}"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"2\frac{1}{2}", r"\frac{5}{2}"),
    ("142", "142.0"),
    ("142.0", "142"),
    ("23", "023"),
    ("1,234", "1234"),
    (r"11{,}111", "11111"),
    (r"10,\!080", "10080"),
    ("1 000", "1000"),
    ("-0.5", r"-\frac12"),
    ("1e3", "1000"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"\{1,2,3\}", r"\{3,2,1\}"),
    ("1,2", "2,1"),
    (r"1 \text{ and } 2", "1,2"),
    (r"\pm 2", "2,-2"),
    ("[0,1)", "[0, 1)"),
    (r"x \in [-2,7]", "[-2,7]"),
    (r"0 \le x < 1", "[0,1)"),
    (r"(3,\infty)\cup(-\infty,2)", r"(-\infty, 2) \cup (3, \infty)"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"),
    (r"5\text{ cm}", "5"),
    ("5", r"5\text{ cm}"),
    (r"\text{5 cm}", "5"),
    (r"12\ \text{cm}^2", "12"),
    (r"90^\circ", "90"),
    (r"90 \text{ degrees}", r"90^\circ"),
    (r"\$18.90", "18.90"),
    ("5 dollars", "5"),
    (r"\text{Evelyn}", "Evelyn"),
    (r"\text{evelyn}", r"\text{Evelyn}"),
    (r"\text{(C)}", "C"),
    (r"\textbf{(B)}", "B"),
    (r"\sqrt{2}", r"\sqrt2"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("x=5", "5"),
    ("$5$", "5"),
    ("5.", "5"),
    ("x^2+2x+1", "(x+1)^2"),
    ("-5i+6", "6 - 5i"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
    ("4210_{5}", "4210_5"),
    ("2^{10}", "1024"),
    (r"\displaystyle\frac{1}{2}", "0.5"),
]
WRONG = [
    ("1/3", r"\frac{1}{2}"),
    ("142.5", "142"),
    ("4", "-4"),
    ("3.14", r"\pi"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("2", "2,3"),
    ("12", "1,2"),
    ("[0,1]", "[0,1)"),
    ("(0,1)", "[0,1]"),
    (r"(-\infty,2]\cup(3,\infty)", r"(-\infty, 2) \cup (3, \infty)"),
    ("(2,1)", "(1,2)"),
    (r"6\text{ cm}", "5"),
    ("Carla", r"\text{Evelyn}"),
    (r"\text{TOM}", r"\text{MOT}"),
    ("A", "B"),
    ("x^2+2x+1", "(x+2)^2"),
    ("4210_{6}", "4210_5"),
    ("x<3", "x>3"),
    ("12345678901234567890", "12345678901234567891"),
    ("2 2", "22"),
    (r"\neq 5", "5"),
    (r"\geq 5", "5"),
    ("5!", "5"),
    (r"\text{12 or 13}", "12"),
    (r"\begin{pmatrix} 1 \\ 3 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]
WHOLE = [  # (response, reference, verdict): where the box is
    (r"First \boxed{3}, then corrected: \boxed{4}.", "4", True),
    (r"First \boxed{3}, then corrected: \boxed{4}.", "3", False),
    ("The answer is 4.", "4", False),
    (r"\boxed{\frac{a}{\frac{b}{c}}}", r"\frac{ac}{b}", True),
    (r"\boxed{x=\boxed{5}}", "5", True),
    (r"\boxed{\left\{1,2\right\}}", "1,2", True),
    (r"\boxed{4", "4", False),
    (r"\boxed{}", "4", False),
    (r"\boxed {4}", "4", True),
    (r"\fbox{4}", "4", True),
    ("", "", False),
    (r"\boxed{5} and not \boxed{}", "5", False),
]
HOSTILE = {
    "tower": r"\boxed{10^{10^{10^{10}}}}",
    "nines": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "factorial": r"\boxed{(10^{8})!}",
    "double factorial": r"\boxed{((99999)!)!}",
    "parentheses": r"\boxed{" + "(" * 450 + "1" + ")" * 450 + "}",
    "fractions": r"\boxed{" + r"\frac{1}{" * 90 + "2" + "}" * 90 + "}",
    "roots": r"\boxed{" + r"\sqrt{2+" * 100 + "1" + "}" * 100 + "}",
    "sum": r"\boxed{\sum_{n=1}^{10^{12}} \frac{\sin n}{n^{3}}}",
    "product of sums": r"\boxed{" + "".join(f"(x+{i})" for i in range(150)) + "}",
    "integral": r"\boxed{\int_0^1 \frac{\sin(x^x)}{\ln(1+x^{x^x})} dx}",
}
ODD = [
    "\\boxed{" * 100_000,
    "\\boxed{x}" * 50_000,
    "{" * 1_000_000,
    "\\boxed{" + "9" * 200_000 + "}",
    "\\boxed{\0\ud800}",
    "\\boxed{'); import os}",
    None,
    5,
    ["\\boxed{5}"],
    b"\\boxed{5}",
]


def box(text):
    return f"So the answer is $\\boxed{{{text}}}$."


@pytest.mark.parametrize(("given_", "reference"), RIGHT)
def test_right_answers(given_, reference):
    assert grade(box(given_), reference) is True


@pytest.mark.parametrize(("given_", "reference"), WRONG)
def test_wrong_answers(given_, reference):
    assert grade(box(given_), reference) is False


@pytest.mark.parametrize(("response", "reference", "verdict"), WHOLE)
def test_the_box(response, reference, verdict):
    assert grade(response, reference) is verdict


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_are_false_in_bounded_time(name):
    start = time.monotonic()
    assert grade(HOSTILE[name], "5") is False
    assert time.monotonic() - start <= 6


@pytest.mark.parametrize("response", ODD)
def test_odd_responses_do_not_raise(response):
    start = time.monotonic()
    assert grade(response, "5") is False
    assert time.monotonic() - start <= 6


def test_hostile_references_do_not_raise():
    for reference in (None, "", "\\boxed{", HOSTILE["tower"], "9" * 100_000, object()):
        assert grade(box("5"), reference) is False


def test_a_killed_process_is_replaced():
    assert grade(HOSTILE["tower"], "5") is False
    assert grade(box(r"\frac{2}{4}"), "1/2") is True


def test_threads_agree_with_the_main_thread():
    found = {}
    threads = [
        threading.Thread(
            target=lambda i=i: found.update({i: [grade(box(a), b) for a, b in RIGHT[i::8] + WRONG[i::8]]})
        )
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(found[i] == [True] * len(RIGHT[i::8]) + [False] * len(WRONG[i::8]) for i in range(8))


def test_a_forked_child_grades_on_its_own():
    assert grade(box(r"\frac{2}{4}"), "1/2")
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, b"1" if grade(box(r"\frac{3}{6}"), "1/2") else b"0")
        os._exit(0)
    assert os.read(reader, 1) == b"1"
    os.close(reader), os.close(writer), os.wait()


def test_a_broken_installation_is_said_and_not_graded_false(monkeypatch):
    monkeypatch.setattr(grading.sys, "executable", "/bin/true")
    with pytest.raises(RuntimeError, match="does not start"):
        GradingProcess().ask("1", "2")


def test_grade_all_is_grade():
    responses = [box(a) for a, _ in RIGHT + WRONG] * 2
    answers = [b for _, b in RIGHT + WRONG] * 2
    assert grade_all(responses, answers) == [True] * len(RIGHT) + [False] * len(WRONG) + [True] * len(
        RIGHT
    ) + [False] * len(WRONG)
    assert grade_all([], []) == []
    with pytest.raises(ValueError, match="answers: 1 for 2 responses"):
        grade_all(["a", "b"], ["a"])


@given(st.integers(-(10**12), 10**12))
def test_integers_in_every_dress(value):
    for dress in (
        f"{value}",
        f"{value}.0",
        f"{value:,}",
        f"{value}\\text{{ cm}}"[: len(str(value))],
        f"$ {value} $",
        f"\\text{{{value}}}",
        f"{value}.",
    ):
        assert quick_verdict(dress, str(value)) is True and quick_verdict(dress, str(value + 1)) is False


@given(
    st.recursive(
        st.sampled_from(["1", "x", r"\{", r"\}", r"\\"]),
        lambda inner: st.lists(inner, min_size=1, max_size=3).map(lambda p: "{" + "".join(p) + "}"),
    )
)
def test_a_balanced_box_comes_out_whole(content):
    assert extract_answer(f"\\boxed{{1}} {box(content)} }}}}") == content


@given(st.text(alphabet="\\boxed{}1 ", max_size=40))
@settings(max_examples=200)
def test_extraction_never_raises(text):
    assert extract_answer(text) is None or extract_answer(text) in text


@given(st.integers(0, 2**31), st.integers(0, 2**31), st.integers(2, 5))
@settings(max_examples=20, deadline=None)
def test_splits_are_disjoint_for_all_seeds(seed, other, operands):
    train, test = sample_problems(200, "train", seed, operands), sample_problems(50, "test", other, operands)
    assert not set(train) & set(test) and len(set(train)) == 200 and len(set(test)) == 50
    assert all(split_of(p) == "train" for p in train) and all(
        grade(solve(p), str(eval(p))) for p in train[:20]
    )


def test_arithmetic_repeats_and_differs_by_seed():
    small = dict(train=50, test=20, validation=20)
    assert (
        arithmetic(**small).test["answer"]
        == arithmetic(**small).test["answer"]
        != arithmetic(**small, seed=1).test["answer"]
    )
    assert arithmetic(train=10, test=20, validation=20).test["prompt"] == arithmetic(**small).test["prompt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(operands=1), "operands=1"),
        (dict(test=0), "test=0"),
        (dict(operands=2, test=5000), "test=5000: there are only"),
    ],
)
def test_arithmetic_says_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        arithmetic(**(dict(train=5, test=5, validation=5) | arguments))


def refused(name) -> str:
    with pytest.raises(ValueError) as caught:
        load_task(name)
    assert "\n" not in str(caught.value) and "task=" in str(caught.value)
    return str(caught.value)


def test_a_saved_task_loads_again(tmp_path):
    small = arithmetic(train=5, test=7, validation=5)
    small.test.to_parquet(tmp_path / "mine.parquet")
    again = load_task(str(tmp_path / "mine.parquet"))
    assert again.train is None and again.name == "mine" and again.test.to_list() == small.test.to_list()


def test_prompts_without_answers_load(tmp_path):
    pd.DataFrame({"prompt": [[{"role": "user", "content": "Hi"}]]}).to_parquet(tmp_path / "bare.parquet")
    assert load_task(tmp_path / "bare.parquet").test[0] == {
        "prompt": [{"role": "user", "content": "Hi"}],
        "answer": None,
    }


def test_the_hub_gives_the_layout_of_the_files(monkeypatch):
    monkeypatch.delenv("OPRD_DATA", raising=False)
    asked = []

    monkeypatch.setattr(loading, "_hub_reason", lambda _: None)

    def hub(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict(
            {"problem": ["1+1? "], "answer": [2.0], "prompt": ["1+1?"], "solution": ["2"]}
        )

    monkeypatch.setattr(datasets, "load_dataset", hub)
    task, training = load_task("aimo"), load_task("dapo")
    assert (
        task.train is None
        and training.test is None
        and asked == [("AI-MO/aimo-validation-amc", None, "train"), (KNOWN["dapo"].hub, "all", "train")]
    )
    assert task.test[0] == {"prompt": [{"role": "user", "content": "1+1?" + INSTRUCTION}], "answer": "2.0"}
    assert training.train[0]["answer"] == "2"


def test_an_unreachable_hub_names_the_way_out(monkeypatch):
    monkeypatch.delenv("OPRD_DATA", raising=False)

    def unreachable(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(loading, "_hub_reason", lambda _: None)
    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert "OPRD_DATA" in refused("math500")


def test_contamination_finds_what_a_double_loop_finds():
    words = "a b c d e".split()
    train = [" ".join(words[(i * j) % 5] for j in range(1, 12)) for i in range(1, 5)]
    test = [" ".join(words[(i + j * j) % 5] for j in range(9)) for i in range(5)] + train[:1]

    def runs(text):
        return [tuple(text.split()[i : i + 3]) for i in range(len(text.split()) - 2)]

    report = contamination(train, test, n=3)
    for text, row in zip(test, report.itertuples(), strict=True):
        listed = runs(text)
        assert row.overlap == pytest.approx(
            sum(any(run in runs(other) for other in train) for run in listed) / len(listed)
        )
        assert row.exact == (text in train)


def test_contamination_ignores_the_instruction_only():
    long = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert contamination(["alpha beta" + INSTRUCTION], ["gamma beta" + INSTRUCTION])["overlap"].isna().all()
    assert contamination([long.upper() + "!"], [long + INSTRUCTION]).loc[0, "overlap"] == 1
    with pytest.raises(ValueError, match="n=0"):
        contamination([long], [long], n=0)


def test_a_task_shows_itself():
    task = Task(
        "mine",
        None,
        datasets.Dataset.from_dict({"prompt": [[{"role": "user", "content": "a|b"}]], "answer": ["1"]}),
    )
    assert list(task.splits()) == ["test"] and "| test | 1 | a\\|b | 1 |" in task._repr_markdown_()


needs_data = pytest.mark.skipif(not os.environ.get("OPRD_DATA"), reason="OPRD_DATA is not set")


@needs_data
@pytest.mark.parametrize(
    ("name", "problems"), [("aime24", 30), ("aime25", 30), ("aimo", 83), ("math500", 500)]
)
def test_real_sets_accept_their_own_answers_and_no_others(name, problems):
    task = load_task(name)
    assert task.train is None and len(task.test) == problems
    answers = task.test["answer"]
    assert all(grade_all([box(a) for a in answers], answers))
    assert sum(grade_all([box(a) for a in [*answers[1:], answers[0]]], answers)) <= 0.05 * problems


@needs_data
def test_the_training_set_and_what_it_shares_with_the_tests():
    dapo = load_task("dapo")
    assert dapo.test is None and len(dapo.train) == 17398 and dapo.train[0]["answer"] == "162"
    for name, exact, mostly in [("aime24", 0, 0), ("aime25", 0, 0), ("aimo", 11, 45), ("math500", 4, 17)]:
        report = contamination(dapo.train, load_task(name).test)
        assert (report["exact"].sum(), (report["overlap"] > 0.5).sum()) == (exact, mostly)
