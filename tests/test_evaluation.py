"""Metrics against brute force, intervals against the truth, and evaluations that survive being cut off."""

import itertools
import math
import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from oprd_nb.core import Rollouts
from oprd_nb.evaluation.comparison import LATEX_NOTE, compare, export_table, paired_difference, paired_table
from oprd_nb.evaluation.metrics import avg_at_k, best_at_k, dist_4g, distinct_n, diversity_size, maj_at_k
from oprd_nb.evaluation.sampling import Evaluation, evaluate, read_samples, stored_rollouts, write_samples
from oprd_nb.models.checks import weights_mark
from oprd_nb.rollouts.samplers import HFSampler, logprob_gap
from oprd_nb.rollouts.settings import SamplingSettings
from oprd_nb.tasks.problems import Task, arithmetic
from oprd_nb.utils import bootstrap_interval

# six problems, four samples: what was answered; the answer is always 7
SAID = [
    ["7", "7", "7", "7.0"],
    ["7", "8", "8", "9"],
    ["8", "8", "8", None],
    ["7", "7", "8", "8"],
    ["8", "7", "7", "7"],
    [None, None, None, "7"],
]


class Letters:
    """A tokenizer of single characters; the end of a turn is 0."""

    chat_template = ""
    pad_token_id = 0
    name_or_path = "letters"

    def batch_decode(self, ids, skip_special_tokens=True):
        return ["".join(chr(i) for i in row if i) for row in ids]


class Scripted:
    """A sampler that says what `speak(prompt, sample, rng)` says; it can be told to fail at a call."""

    tokenizer = Letters()
    eos_token_ids = [0]

    def __init__(self, speak, fails_at=None):
        self.speak = speak
        self.fails_at = fails_at
        self.calls = 0
        self.asked = []

    def sample(self, prompts, n=1, temperature=1.0, max_new_tokens=64, seed=0, **filters):
        self.filters = filters
        self.calls += 1
        if self.calls == self.fails_at:
            raise ConnectionError("the machine went away")
        rng = np.random.default_rng(seed)
        texts = [p[-1]["content"] for p in prompts]
        self.asked += texts
        spoken = [
            [*map(ord, self.speak(text, i, rng)), 0][:max_new_tokens] for text in texts for i in range(n)
        ]
        log_probs = [[-1.0] * len(ids) for ids in spoken]
        return Rollouts.from_ids([[1]] * len(spoken), spoken, 0, log_probs=log_probs)

    def sync(self, student):
        pass


def questions(count, name="letters"):
    return Task(
        name,
        None,
        Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": f"{i}"}] for i in range(count)], "answer": ["7"] * count}
        ),
        max_new_tokens=80,
    )


def says(text, i, rng):
    answer = SAID[int(text)][i]
    return f"I think that the answer is \\boxed{{{answer}}}" if answer else "I do not know the answer"


def skill(chance):
    return lambda text, i, rng: f"it is \\boxed{{{7 if rng.random() < chance else rng.integers(8, 12)}}}"


def quiet(sampler, task, **options):
    return evaluate(sampler, task, progress=False, **({"batch_size": 8} | options))


# ---- metrics


def test_every_metric_of_the_fixture_by_hand():
    result = quiet(Scripted(says), questions(6), n=4, ks=(1, 2, 3, 4))
    expected = {
        "avg@4": 11 / 24,
        "best@1": 11 / 24,
        "best@2": (1 + 1 / 2 + 0 + 5 / 6 + 1 + 1 / 2) / 6,
        "best@3": (1 + 3 / 4 + 0 + 1 + 1 + 3 / 4) / 6,
        "best@4": 5 / 6,
        "maj@1": 11 / 24,
        "maj@2": (1 + 1 / 4 + 0 + 1 / 2 + 3 / 4 + 1 / 2) / 6,
        "maj@3": (1 + 0 + 0 + 1 + 1 + 0) / 6,
        "maj@4": (1 + 0 + 0 + 1 / 2 + 1 + 1) / 6,
        "format_error": 4 / 24,
        "truncated": 0.0,
        "solve_none": 1 / 6,
        "solve_all": 1 / 6,
    }
    # Seven words have four 4-grams, of which only the last holds the answer; six words have three.
    grams = [(4 + 1) / 16, (4 + 2) / 16, (4 + 3) / 15, (4 + 1) / 16, (4 + 1) / 16, (3 + 4) / 13]
    expected["dist4"] = sum(grams) / 6
    boxed = len("I think that the answer is \\boxed{7}") + 1
    unboxed = len("I do not know the answer") + 1
    expected["length/mean"] = (20 * boxed + 2 + 4 * unboxed) / 24
    for name, value in expected.items():
        assert result[name] == pytest.approx(value), name
    table = np.array([[answer in ("7", "7.0") for answer in row] for row in SAID])
    assert (avg_at_k(table), best_at_k(table, 2), maj_at_k(SAID, table)) == pytest.approx(
        (expected["avg@4"], expected["best@2"], expected["maj@4"])
    )


@given(
    st.integers(1, 6).flatmap(
        lambda n: st.tuples(
            st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=5),
            st.integers(1, n),
        )
    )
)
def test_best_at_k_is_brute_force_over_subsets(drawn):
    rows, k = drawn
    brute = np.mean([np.mean([any(chosen) for chosen in itertools.combinations(row, k)]) for row in rows])
    assert best_at_k(np.array(rows), k) == pytest.approx(brute)


def test_best_at_k_is_unbiased():
    rng = np.random.default_rng(0)
    chances = rng.random(400)
    found = best_at_k(rng.random((400, 16)) < chances[:, None], 4)
    assert found == pytest.approx(np.mean(1 - (1 - chances) ** 4), abs=0.02)


@given(
    st.lists(st.lists(st.sampled_from("abc"), min_size=0, max_size=9), min_size=1, max_size=4),
    st.integers(1, 3),
    st.integers(1, 6),
)
def test_distinct_n_at_equal_size_is_the_mean_over_all_draws(sequences, n, size):
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    if len(grams) < size:
        assert math.isnan(distinct_n(sequences, n, size))
    elif math.comb(len(grams), size) < 3000:
        assert distinct_n(sequences, n, size) == pytest.approx(
            np.mean([len(set(d)) / size for d in itertools.combinations(grams, size)])
        )
        assert distinct_n(sequences, n) == pytest.approx(len(set(grams)) / len(grams))


def test_dist_4g_counts_words():
    assert dist_4g(["a b c d e", "a b c d f"]) == 3 / 4 and math.isnan(dist_4g(["a b c"]))


def test_distinct_at_equal_size_does_not_punish_length():
    rng = np.random.default_rng(0)
    short = rng.integers(0, 8, (2, 300)).tolist()
    long = rng.integers(0, 8, (2, 3000)).tolist()
    assert distinct_n(long, 3) < 0.5 * distinct_n(short, 3)
    assert distinct_n(long, 3, 200) == pytest.approx(distinct_n(short, 3, 200), rel=0.05)


@pytest.mark.parametrize(
    "call",
    [
        lambda: avg_at_k(np.zeros((0, 4))),
        lambda: avg_at_k([True, False]),
        lambda: best_at_k([[True, False]], 3),
        lambda: best_at_k([[True]], 0),
        lambda: maj_at_k([["7"]], [[True, True]]),
    ],
)
def test_metrics_say_what_is_wrong(call):
    with pytest.raises(ValueError) as caught:
        call()
    assert "\n" not in str(caught.value) and ":" in str(caught.value)


# ---- intervals


@pytest.mark.parametrize(("problems", "least", "most"), [(100, 0.93, 0.97), (30, 0.92, 0.98)])
def test_intervals_hold_the_truth(problems, least, most):
    rng = np.random.default_rng(2)
    values = rng.binomial(4, rng.beta(2, 2, (1000, problems))) / 4
    low, high = bootstrap_interval(values)
    assert least <= np.mean((low <= 0.5) & (0.5 <= high)) <= most
    outside = np.mean(low > 0.5), np.mean(high < 0.5)
    assert max(outside) < 0.05  # misses on both sides


def test_intervals_are_a_little_wider_than_the_plain_bootstrap_and_vectorised():
    values = np.random.default_rng(0).random((3, 30))
    low, high = bootstrap_interval(values)
    for i, row in enumerate(values):
        plain = stats.bootstrap(
            (row,), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(0)
        ).confidence_interval
        assert (
            low[i] < plain.low and plain.high < high[i] and high[i] - low[i] < 1.15 * (plain.high - plain.low)
        )
    assert np.isnan(bootstrap_interval([1.0])).all() and bootstrap_interval([0.5] * 9) == (0.5, 0.5)


# ---- evaluate


def test_the_table_of_samples():
    task = Task(
        "talk",
        None,
        Dataset.from_dict(
            {
                "prompt": [
                    [{"role": "system", "content": "Sum."}, {"role": "user", "content": str(i)}]
                    for i in range(6)
                ],
                "answer": ["7"] * 6,
            }
        ),
    )
    samples = quiet(Scripted(says), task, n=4).samples
    assert list(samples[["problem", "sample"]].itertuples(index=False, name=None)) == [
        (p, s) for p in range(6) for s in range(4)
    ]
    first = samples.iloc[11].to_dict()
    assert (
        first
        | {
            "prompt": "system: Sum.\n\nuser: 2",
            "answer": "7",
            "response": "I do not know the answer",
            "tokens": 25,
            "truncated": False,
            "correct": False,
            "extracted": None,
            "set": "talk",
            "step": 0,
            "log_prob": -25.0,
        }
        == first
    )
    assert first["token_ids"][-1] == 0 and first["seconds"] > 0


def test_truncation_is_seen():
    result = quiet(Scripted(skill(1.0)), questions(3), n=2, max_new_tokens=6)
    assert (
        result["truncated"] == result["format_error"] == result["solve_none"] == 1
        and result["length/mean"] == 6
    )


def test_a_summary_has_the_promised_names_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        summary = quiet(Scripted(skill(0.5)), questions(20), n=4).summary
    assert list(summary.columns) == ["metric", "value", "low", "high"]
    assert summary["metric"].tolist() == [
        "avg@4",
        "best@4",
        "maj@4",
        "dist4",
        "distinct_4",
        "length/mean",
        "truncated",
        "format_error",
        "unfinished",
        "solve_none",
        "solve_all",
    ]
    held = summary.dropna()
    assert (held["low"] <= held["value"] + 1e-12).all() and (held["value"] <= held["high"] + 1e-12).all()


def test_seeds_repeat_and_differ():
    task = questions(12)
    one, same, other = (
        quiet(Scripted(skill(0.5)), task, n=2, seed=seed).samples["response"].tolist() for seed in (0, 0, 1)
    )
    assert one == same != other


@pytest.mark.parametrize("fails_at", [1, 2, 5])
def test_a_cut_evaluation_goes_on_and_ends_the_same(tmp_path, fails_at):
    task = questions(17)
    path = tmp_path / "runs" / "after.parquet"
    whole = quiet(Scripted(skill(0.5)), task, n=4).samples.drop(columns="seconds")
    sampler = Scripted(skill(0.5), fails_at)
    with pytest.raises(ConnectionError):
        quiet(sampler, task, n=4, path=path)
    assert not path.exists()
    resumed = quiet(sampler, task, n=4, path=str(path))
    pd.testing.assert_frame_equal(resumed.samples.drop(columns="seconds"), whole)
    assert len(sampler.asked) == 17 and [p.name for p in path.parent.iterdir()] == ["after.parquet"]
    calls = sampler.calls
    again = quiet(sampler, task, n=4, path=path)
    assert sampler.calls == calls and again.summary.equals(resumed.summary)


def test_it_goes_on_with_another_batch_size(tmp_path):
    sampler = Scripted(skill(0.5), fails_at=3)
    with pytest.raises(ConnectionError):
        quiet(sampler, questions(17), n=4, path=tmp_path / "a.parquet")
    result = quiet(sampler, questions(17), n=4, path=tmp_path / "a.parquet", batch_size=20)
    assert len(result.samples) == 68
    assert sorted(map(int, sampler.asked)) == list(range(17))


@pytest.mark.parametrize("change", [dict(n=2), dict(temperature=1.0), dict(seed=1), dict(max_new_tokens=9)])
@pytest.mark.parametrize("fails_at", [None, 2])
def test_other_settings_are_refused(tmp_path, change, fails_at):
    sampler = Scripted(skill(0.5), fails_at)
    asked = dict(n=4, path=tmp_path / "a.parquet")
    try:
        quiet(sampler, questions(5), **asked)
    except ConnectionError:
        pass
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*use another path"):
        quiet(sampler, questions(5), **(asked | change))
    with pytest.raises(ValueError, match="checksum|problems|set"):
        quiet(
            sampler,
            Task("letters", None, questions(6).test.select(range(1, 6))),
            **(asked | dict(max_new_tokens=80)),
        )


def test_another_model_is_refused(tmp_path):
    sampler = Scripted(skill(0.5))
    model = torch.nn.Linear(4, 4)
    mark = weights_mark(model)
    quiet(sampler, questions(5), n=1, path=tmp_path / "a.parquet", weights=mark)
    torch.nn.init.zeros_(model.bias)
    assert weights_mark(model) != mark
    with pytest.raises(ValueError, match="weights="):
        quiet(sampler, questions(5), n=1, path=tmp_path / "a.parquet", weights=weights_mark(model))


def test_a_torn_file_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for call in (
        lambda: Evaluation.load(tmp_path / "a.parquet"),
        lambda: Evaluation.load(tmp_path / "none.parquet"),
        lambda: quiet(Scripted(says), questions(6), n=4, path=tmp_path / "a.parquet"),
    ):
        with pytest.raises(ValueError, match="cannot be read as samples") as caught:
            call()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (Task("dapo", questions(2).test, None), {}, "has no test problems"),
        (questions(2), dict(n=0), "n=0"),
        (questions(2), dict(n=2, ks=(3,)), "ks="),
        (
            Task(
                "bare",
                None,
                Dataset.from_dict({"prompt": [[{"role": "user", "content": "1"}]], "answer": [None]}),
            ),
            {},
            "has no answer",
        ),
    ],
)
def test_bad_questions_are_refused(task, options, message):
    with pytest.raises(ValueError, match=message):
        quiet(Scripted(skill(1.0)), task, **options)


def test_a_saved_evaluation_loads_again(tmp_path):
    result = quiet(Scripted(says), questions(6), n=4, ks=(2, 4))
    assert result.save(tmp_path / "deep" / "a.parquet") == tmp_path / "deep" / "a.parquet"
    again = Evaluation.load(tmp_path / "deep" / "a.parquet")
    pd.testing.assert_frame_equal(again.summary, result.summary)
    assert (
        again.settings == result.settings
        and again.ks == (2, 4)
        and again.samples["extracted"].iloc[11] is None
    )
    assert "| avg@4 | 45.8 |" in again._repr_markdown_()
    with pytest.raises(KeyError, match="avg@4"):
        again["avg@16"]


def test_tables_that_are_no_evaluation_are_refused():
    samples = quiet(Scripted(says), questions(6), n=4).samples
    for broken, message in [
        (samples.drop(columns="correct"), "'correct'"),
        (samples.iloc[:-1], "3 to 4 samples"),
        (samples.assign(set=["a"] * 12 + ["b"] * 12), "holds the sets"),
    ]:
        with pytest.raises(ValueError, match=message):
            Evaluation(broken, {})


def test_a_table_without_token_ids_has_all_but_the_token_metric():
    samples = quiet(Scripted(says), questions(6), n=4).samples.drop(columns=["token_ids", "log_prob"])
    result = Evaluation(samples, {})
    assert (
        "distinct_4" not in result.by_problem
        and result["avg@4"] == pytest.approx(11 / 24)
        and result.settings["set"] == "letters"
    )


def test_the_embedded_student_through_its_own_sampler(same, tmp_path):
    task = arithmetic(train=1, validation=1, test=20)
    result = evaluate(
        HFSampler(same.student, same.tokenizer), task, n=2, path=tmp_path / "before.parquet", progress=False
    )
    assert len(result.samples) == 40 and result.samples["tokens"].max() <= task.max_new_tokens == 48
    assert result.samples["response"].equals(
        pd.Series(
            same.tokenizer.batch_decode(
                [list(ids) for ids in result.samples["token_ids"]], skip_special_tokens=True
            )
        )
    )


# ---- comparisons


def test_compare_is_scipys_permutation_test_on_the_differences():
    task = questions(40)
    a = quiet(Scripted(skill(0.6)), task, n=4)
    b = quiet(Scripted(skill(0.4)), task, n=4, seed=1)
    row = compare(a, b).set_index("metric").loc["avg@4"]
    difference = (a.by_problem["avg@4"] - b.by_problem["avg@4"]).to_numpy()
    exact = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=9999, rng=5
    )
    assert row["difference"] == pytest.approx(difference.mean()) == pytest.approx(a["avg@4"] - b["avg@4"])
    assert row["p"] == pytest.approx(exact.pvalue, abs=0.01) and row["low"] < row["difference"] < row["high"]
    back = compare(b, a).set_index("metric").loc["avg@4"]
    assert back["difference"] == -row["difference"] and back["p"] == pytest.approx(row["p"], abs=0.01)


def test_p_values_are_uniform_where_there_is_no_difference():
    rng = np.random.default_rng(0)
    task = questions(30)

    def run(seed):
        rows = [
            {
                "problem": p,
                "sample": s,
                "prompt": str(p),
                "response": "",
                "tokens": 1,
                "truncated": False,
                "correct": rng.random() < 0.5,
                "extracted": "7",
            }
            for p in range(30)
            for s in range(2)
        ]
        return Evaluation(pd.DataFrame(rows), {})

    p = [compare(run(0), run(1), ["avg@2"]).loc[0, "p"] for _ in range(100)]
    assert len(task.test) == 30 and 0.0 <= np.mean(np.array(p) < 0.05) <= 0.12 and 0.35 < np.mean(p) < 0.7


def test_a_run_is_not_different_from_itself():
    run = quiet(Scripted(says), questions(6), n=4)
    table = compare(run, run)
    assert (table["difference"].dropna() == 0).all() and (table["p"].dropna() == 1).all()


def test_token_diversity_is_compared_at_the_smaller_size():
    task = questions(12)
    short = quiet(Scripted(skill(0.5)), task, n=2)
    long = quiet(Scripted(lambda text, i, rng: "ab" * 20 + skill(0.5)(text, i, rng)), task, n=2)
    row = compare(long, short, ["distinct_4"]).loc[0]
    assert row["b"] == pytest.approx(short["distinct_4"]) and row["a"] != pytest.approx(long["distinct_4"])


def test_other_problems_are_refused():
    with pytest.raises(ValueError, match="other problems"):
        compare(
            quiet(Scripted(skill(0.5)), questions(5), n=1), quiet(Scripted(skill(0.5)), questions(6), n=1)
        )


# ---- many runs


@pytest.fixture(scope="module")
def several():
    tasks = [questions(60, "set_1"), questions(40, "set_2")]
    return {
        name: [quiet(Scripted(skill(chance)), task, n=4, seed=i) for task in tasks]
        for i, (name, chance) in enumerate(
            {"good": 0.7, "as_good": 0.69, "bad": 0.3, "teacher": 0.95}.items()
        )
    }


def test_the_table_marks_the_best_and_what_is_within_noise(several):
    table = paired_table(several, metrics=["avg@", "length/mean", "format_error"], outside=["teacher"])
    rows = table.rows.set_index(["run", "set", "metric"])
    for set_name in ("set_1", "set_2"):
        best = {name: rows.loc[(name, set_name, "avg@4"), "best"] for name in several}
        noise = {name: rows.loc[(name, set_name, "avg@4"), "within_noise"] for name in several}
        assert (
            sum(best.values()) == 1
            and not best["teacher"]
            and not noise["teacher"]
            and not best["bad"]
            and not noise["bad"]
        )
        assert best["good"] + best["as_good"] == noise["good"] + noise["as_good"] == 1
    assert not rows.xs("length/mean", level="metric")["best"].any() and len(table.cells()) == 4


def test_the_table_in_every_format(several, tmp_path):
    table = paired_table(several, metrics=["avg@4", "format_error"], outside=["teacher"])
    lines = str(table).splitlines()
    assert (
        lines[0] == "| run | set_1 avg@4 | set_1 format_error | set_2 avg@4 | set_2 format_error |"
        and lines[2].startswith("| good | ")
        and "**" in lines[2] + lines[3]
    )
    assert all(line.count("|") == 6 for line in lines[:6]) and table._repr_markdown_() == str(table)
    latex = table.to_latex()
    assert (
        latex.startswith("\\begin{tabular}{lrrrr}")
        and "set\\_1 avg@4" in latex
        and "as\\_good" in latex
        and "\\textbf{" in latex
        and "$^{\\approx}$" in latex
    )
    assert all(line.endswith("\\\\") for line in latex.splitlines()[2:] if "&" in line)
    table.to_csv(tmp_path / "table.csv")
    stored = pd.read_csv(tmp_path / "table.csv")
    pd.testing.assert_frame_equal(stored, table.rows, check_dtype=False)


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("t2", ["t2.csv", "t2.md", "t2.tex"]),
        ("v0.2", ["v0.2.csv", "v0.2.md", "v0.2.tex"]),
        ("t2.tex", ["t2.tex"]),
        ("t2.md", ["t2.md"]),
        ("t2.csv", ["t2.csv"]),
    ],
)
def test_an_exported_table_is_the_table(several, tmp_path, name, written):
    table = paired_table(several, metrics=["avg@4"], outside=["teacher"])
    files = export_table(table, tmp_path / "deep" / name)
    assert (
        sorted(file.name for file in files)
        == written
        == sorted(file.name for file in (tmp_path / "deep").iterdir())
    )
    wanted = {
        ".md": f"{table.to_markdown()}\n",
        ".tex": f"{LATEX_NOTE}\n{table.to_latex()}\n",
        ".csv": table.to_csv(),
    }
    assert (
        all(file.read_text("utf-8") == wanted[file.suffix] for file in files)
        and LATEX_NOTE.startswith("%")
        and "\n" not in LATEX_NOTE
    )


def test_the_formats_mark_the_same_cells(several):
    table = paired_table(several, metrics=["avg@4", "truncated"], outside=["teacher"])
    markdown = [
        [cell.strip() for cell in line.strip("|").split("|")][1:] for line in str(table).splitlines()[2:6]
    ]
    latex = [
        [cell.strip() for cell in line.removesuffix(r"\\").split("&")][1:]
        for line in table.to_latex().splitlines()[4:8]
    ]
    for rows in zip(markdown, latex, strict=True):
        for cell, other in zip(*rows, strict=True):
            assert ("**" in cell, "≈" in cell) == ("textbf" in other, "approx" in other)
            assert cell.strip("*≈ ") in other
    assert sum("**" in cell for row in markdown for cell in row) >= 2 and any(
        "≈" in cell for row in markdown for cell in row
    )


def test_names_with_signs_of_both_languages(several):
    rows = several["good"]
    table = paired_table({r"runs\a_1|50%~{x}^2 & #$": rows, "plain": several["bad"]}, metrics=["avg@4"])
    line = table.to_latex().splitlines()[4]
    assert (
        line.startswith(r"runs\textbackslash{}a\_1|50\%\textasciitilde{}\{x\}\textasciicircum{}2 \& \#\$ & ")
        and line.replace(r"\&", "").count("&") == 2
    )
    assert str(table).splitlines()[2].replace(r"\|", "").count("|") == 4


def test_fewer_truncations_are_better_and_a_missing_set_is_a_dash(several):
    cut = {"cut": [quiet(Scripted(skill(0.9)), questions(60, "set_1"), n=4, max_new_tokens=5)]}
    table = paired_table({"good": several["good"]} | cut, metrics=["truncated", "avg@"])
    assert table.rows.set_index(["run", "set", "metric"]).loc[("good", "set_1", "truncated"), "best"]
    assert table.cells().loc["cut", "set_2 avg@4"] == "–"


def test_single_runs_and_empty_tables():
    run = quiet(Scripted(says), questions(6), n=4)
    assert paired_table({"only": run}).cells().loc["only", "avg@4"] == "45.8"
    with pytest.raises(ValueError, match="evaluations is empty"):
        paired_table({})
    with pytest.raises(ValueError, match="metrics="):
        paired_table({"only": run}, metrics=["nonsense"])


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 20))
def test_every_problem_is_asked_once_whatever_the_batch(count, n, batch):
    sampler = Scripted(skill(0.5))
    result = quiet(sampler, questions(count), n=n, batch_size=batch)
    assert sampler.asked == [str(i) for i in range(count)] and len(result.samples) == count * n


def test_a_sampler_needs_no_log_probabilities():
    base = Scripted(says)

    def sample(*args, **options):
        return replace(base.sample(*args, **options), log_probs=None)

    bare = SimpleNamespace(sample=sample, tokenizer=base.tokenizer, eos_token_ids=base.eos_token_ids)
    samples = quiet(bare, questions(6), n=4).samples
    assert samples["log_prob"].isna().all()
    assert "token_log_probs" not in samples


def test_samples_come_back_as_rollouts(same, tmp_path):
    problems = same.task.test.select(range(3))
    sampler = HFSampler(same.student, same.tokenizer)
    options = dict(n=2, max_new_tokens=12, batch_size=4, progress=False, seed=3)
    evaluate(sampler, problems, path=tmp_path / "a.parquet", **options)
    result = Evaluation.load(tmp_path / "a.parquet")
    assert result.settings["set"] == "problems"
    rollouts = result.rollouts(problems["prompt"], same.tokenizer)
    assert rollouts.responses() == [list(ids) for ids in result.samples["token_ids"]]
    assert rollouts.prompts == [messages for messages in problems["prompt"] for _ in range(2)]
    assert rollouts.log_probs.sum(1).tolist() == pytest.approx(result.samples["log_prob"].tolist())
    assert logprob_gap(same.student, rollouts) < 1e-5
    with pytest.raises(ValueError, match="token_ids"):
        stored_rollouts(result.samples.drop(columns="token_ids"), problems["prompt"], same.tokenizer)


def test_filters_reach_the_sampler_and_the_file(tmp_path):
    sampler = Scripted(lambda text, i, rng: "\\boxed{7}###")
    path = tmp_path / "samples.parquet"
    card = SamplingSettings(0.6, top_p=0.9, stop=("###",), max_new_tokens=12)
    result = evaluate(sampler, questions(2), n=1, path=path, progress=False, **card.keywords())
    assert sampler.filters == {"top_p": 0.9, "stop": ("###",)}
    # The responses have eleven characters and no end token within them: the stop text ends them.
    assert not result.samples["truncated"].any()
    stored = Evaluation.load(path).settings
    assert {name: stored[name] for name in card.stored()} == card.stored()
    assert (
        evaluate(sampler, questions(2), n=1, path=path, progress=False, **card.keywords()).settings == stored
    )
    with pytest.raises(ValueError, match="top_p=0.9, but top_p=1.0 is requested"):
        evaluate(sampler, questions(2), n=1, path=path, temperature=0.6, max_new_tokens=12, progress=False)


def test_settings_that_cannot_be_meant_are_refused_before_sampling():
    sampler = Scripted(lambda text, i, rng: "7")
    for wrong in ({"temperature": float("nan")}, {"top_p": 2.0}, {"max_new_tokens": 0}, {"n": 0.5}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            evaluate(sampler, questions(1), **{"n": 1} | wrong)
    assert not sampler.calls


def test_wrong_votes_for_the_same_are_one_party():
    """Three votes for a half, each written differently, outvote two right ones."""
    answers = [["1/3", r"\frac13", "1/2", "0.5", r"\frac{1}{2}"]]
    assert maj_at_k(answers, [[True, True, False, False, False]]) == 0
    assert maj_at_k([["1/3", "1/3", "1/2", "0.5"]], [[True, True, False, False]]) == 1 / 2
    assert maj_at_k([["1/3", "1/3", "1/2", "0.4"]], [[True, True, False, False]]) == 1


def test_a_right_response_without_a_box_votes():
    """A grader of one's own may need no box."""
    assert maj_at_k([[None, None, "8"]], [[True, True, False]]) == 1


def test_a_grader_of_ones_own_and_its_name_in_the_file(tmp_path):
    def whispered(response, answer):
        return f"it is {answer}" in response

    problems = questions(3)
    path = tmp_path / "samples.parquet"
    result = quiet(Scripted(lambda *_: "it is 7"), problems, n=2, grade_with=whispered, path=path)
    assert result["avg@2"] == result["maj@2"] == 1
    assert "whispered" in Evaluation.load(path).settings["grade_with"]
    assert quiet(Scripted(lambda *_: "it is 7"), problems, n=2, grade_with="number")["avg@2"] == 1
    assert quiet(Scripted(lambda *_: "it is 7"), problems, n=2)["avg@2"] == 0
    with pytest.raises(ValueError, match="grade_with='number' is requested"):
        quiet(Scripted(says), problems, n=2, grade_with="number", path=path)
    with pytest.raises(ValueError, match="grade_with='numbr': no such grader"):
        quiet(Scripted(says), problems, n=2, grade_with="numbr")


def test_unfinished_thinking_is_reported_and_does_not_count():
    def thinks(text, i, rng):
        return "<think>\\boxed{7}" if i else "<think>hm</think>\\boxed{7}"

    result = quiet(Scripted(thinks), questions(2), n=4)
    assert result["unfinished"] == 3 / 4
    assert result["avg@4"] == 1 / 4
    assert quiet(Scripted(thinks), questions(2), n=4, unfinished=True)["avg@4"] == 1
    bold = Scripted(lambda *_: "**7**")
    assert [quiet(bold, questions(2), n=1, bold=count)["avg@1"] for count in (False, True)] == [0, 1]


def test_intervals_of_shares_stay_between_0_and_1():
    for level in (0.02, 0.5, 0.98):
        result = quiet(Scripted(skill(level)), questions(12), n=4, ks=(1, 2, 3, 4))
        shares = result.summary[~result.summary["metric"].str.startswith("length")]
        assert (shares[["value", "low", "high"]].stack().dropna().between(0, 1)).all()


@pytest.mark.parametrize("answer", [None, "", "  "])
def test_a_set_without_answers_is_refused_before_sampling(answer):
    sampler = Scripted(says)
    prompt = [{"role": "user", "content": "1"}]
    bare = Dataset.from_dict({"prompt": [prompt] * 2, "answer": ["7", answer]})
    with pytest.raises(ValueError, match="problem 1 has no answer"):
        quiet(sampler, bare, n=1)
    with pytest.raises(ValueError, match="add a column 'answer'"):
        quiet(sampler, bare.remove_columns("answer"), n=1)
    assert not sampler.calls


def test_two_problems_are_enough_for_a_difference():
    two = paired_difference(np.array([1.0, 0.5]), np.array([0.0, 0.0]))
    assert two.mean == 0.75 and two.low <= 0.75 <= two.high and two.p == 0.5  # of 4 signs, 2 are as far off
    one = paired_difference(np.array([1.0, np.nan]), np.array([0.0, 0.0]))
    assert math.isnan(one.mean) and math.isnan(one.p)


def test_stored_samples_are_numbered_anew(tmp_path):
    table = pd.DataFrame({"problem": [0, 1], "sample": [0, 0], "correct": [True, False]}, index=[7, 3])
    found, _ = read_samples(write_samples(table, {}, tmp_path / "samples.parquet"))
    assert found.index.tolist() == [0, 1] and list(found.columns) == list(table.columns)


def test_responses_shorter_than_an_n_gram_have_none():
    """Each problem has a response of 8 tokens, which are five 4-grams, and one of 2."""
    rows = [
        {"problem": problem, "sample": sample, "token_ids": list(range(length))}
        for problem in range(3)
        for sample, length in enumerate((8, 2))
    ]
    assert diversity_size(pd.DataFrame(rows)) == 5
    assert diversity_size(pd.DataFrame(rows)[1::2]) == 1


def test_an_aligned_table_has_one_width_and_a_rule_under_its_names(several):
    table = paired_table(several, metrics=["avg@4"], outside=["teacher"])
    lines = [line for line in table.to_markdown(aligned=True).splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1
    assert re.fullmatch(r"\| -+ \|( -+: \|)+", lines[1])
