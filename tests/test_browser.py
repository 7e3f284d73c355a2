"""The rollout browser: scores against a naive reference, text that cannot become markup, and its controls, in Python and in a browser."""

import math
import os
import time
from html.parser import HTMLParser
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_qwen3
from hypothesis import given, settings
from hypothesis import strategies as st
from test_explore import CHROMIUM, opened

from oprd_nb.core import Rollouts
from oprd_nb.evaluation.sampling import stored_rollouts
from oprd_nb.explore import scores
from oprd_nb.explore.rollouts import RolloutBrowser, answers_of
from oprd_nb.explore.scores import (
    chosen_samples,
    load_tokens,
    save_tokens,
    score_samples,
    score_tokens,
    token_texts,
)
from oprd_nb.explore.tokens import (
    SCORES,
    blend,
    colour_of,
    legend_html,
    letters,
    scale_max,
    text_html,
    token_figure,
    token_html,
)
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.representation import Representation
from oprd_nb.pairing.positions import pair_positions
from oprd_nb.runs import synthetic_run
from oprd_nb.teachers import Teacher

EVIL = "<img src=x onerror='window.hacked = 1'></span><script>window.hacked = 1</script>\" onmouseover=\"window.hacked = 1"


class Mirror:
    """A bridge of one layer pair: the student's rows as they are, the teacher's turned around, boundaries only."""

    layer_pairs, offsets = [(2, 2)], (0,)

    def project_student(self, layer, rows):
        return rows

    def project_teacher(self, layer, rows, offsets=None):
        assert offsets is None or not offsets.any()
        return rows.flip(-1)

    def check(self, student, teacher, tokenizer, final_norm):
        pass


def some_rollouts(pair, count=7, prompts=True):
    """Responses of different lengths, right or wrong, without sampling."""
    texts = [
        "1+2=3\n",
        "37+58=95\n95+94=189\n\\boxed{189}",
        "\\boxed{7}",
        "4",
        "99+99=198",
        "5+5=10\n10+1=11\n",
        "\\boxed{",
    ][:count]
    asked = [[{"role": "user", "content": f"{i}+1+2"}] for i in range(count)]
    ids = [
        pair.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]
        for messages in asked
    ]
    responses = [
        pair.tokenizer(text, add_special_tokens=False)["input_ids"] + [pair.tokenizer.eos_token_id] * (i % 2)
        for i, text in enumerate(texts)
    ]
    return Rollouts.from_ids(ids, responses, pair.tokenizer.pad_token_id, asked if prompts else None)


@torch.no_grad()
def reference(student, teacher, rollouts, bridge=None, predicting=False):
    """kl and distance of each token, one response at a time, one number at a time."""
    rows = []
    for prompt, response in zip(rollouts.prompt_ids(), rollouts.responses(), strict=True):
        ours, theirs = (
            model(torch.tensor([prompt + response]), output_hidden_states=True)
            for model in (student, teacher)
        )
        for i in range(len(prompt), len(prompt) + len(response)):
            p, q = (out.logits[0, i - 1].double().softmax(-1) for out in (ours, theirs))
            kl = sum(a * math.log(a / b) for a, b in zip(p.tolist(), q.tolist(), strict=True))
            at = i - predicting
            states = (
                [(ours.hidden_states[2][0, at], theirs.hidden_states[2][0, at].flip(-1))]
                if bridge
                else [
                    (a[0, at], b[0, at])
                    for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
                ]
            )
            rows.append((kl, 1 - np.mean([F.cosine_similarity(a, b, dim=0).item() for a, b in states])))
    return np.array(rows)


# ---- scores


@pytest.mark.parametrize("max_tokens", [1, 120, 10_000])
@pytest.mark.parametrize(
    ("term", "options"),
    [
        (None, {}),
        (Representation(positions="last:2"), {}),
        (Representation(layers=[2], bridge=Mirror()), {"bridge": True}),
        (Representation(predicting=True), {"predicting": True}),
    ],
    ids=["default", "few positions", "bridge", "predicting"],
)
def test_scores_are_the_reference(same, term, options, max_tokens):
    rollouts = some_rollouts(same)
    table = score_tokens(
        same.student,
        Teacher(same.teacher, same.teacher_tokenizer),
        rollouts,
        same.tokenizer,
        term,
        max_tokens,
    )
    assert np.allclose(
        table[["kl", "distance"]], reference(same.student, same.teacher, rollouts, **options), atol=2e-4
    )
    assert (
        table["offset"].eq(0).all()
        and table.groupby("response").size().tolist() == rollouts.response_lengths.tolist()
    )
    assert table.groupby("response")["text"].agg("".join).str.replace(
        "<|end|>", ""
    ).tolist() == rollouts.texts(same.tokenizer)
    assert (table.groupby("response")["position"].diff().dropna() == 1).all()


def test_a_student_beside_itself_scores_nothing(same):
    table = score_tokens(
        same.student, Teacher(same.student, same.tokenizer), some_rollouts(same), same.tokenizer
    )
    assert table["kl"].abs().max() < 1e-6 and table["distance"].abs().max() < 1e-6


def test_scoring_leaves_the_student_as_it_was(same):
    same.student.train()
    before = {name: value.clone() for name, value in same.student.state_dict().items()}
    table = score_tokens(
        same.student, Teacher(same.teacher, same.teacher_tokenizer), some_rollouts(same), same.tokenizer
    )
    assert same.student.training and len(table) and all(p.grad is None for p in same.student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in same.student.state_dict().items())


def test_across_tokenizers_there_is_pairing_and_no_kl():
    pair = embedded("cross_tokenizer")
    rollouts = some_rollouts(pair)
    table = score_tokens(
        pair.student, Teacher(pair.teacher, pair.teacher_tokenizer), rollouts, pair.tokenizer, max_tokens=80
    )
    pairs = pair_positions(rollouts, pair.tokenizer, pair.teacher_tokenizer, min_coverage=0.0)
    offsets, columns = (
        pairs.offsets[rollouts.response_mask].tolist(),
        pairs.teacher_positions[rollouts.response_mask].tolist(),
    )
    assert [None if pd.isna(value) else value for value in table["offset"]] == [
        offset if column >= 0 else None for offset, column in zip(offsets, columns, strict=True)
    ]
    assert table[["kl", "distance"]].isna().all(axis=None) and set(table["offset"].dropna()) >= {0, 1}


def test_other_widths_need_a_bridge(same):
    wide = tiny_qwen3(vocab_size=same.student.config.vocab_size, width=64)
    table = score_tokens(same.student, Teacher(wide, same.tokenizer), some_rollouts(same), same.tokenizer)
    assert table["distance"].isna().all() and table["kl"].gt(0).all()


# ---- text of tokens


class Bytes:
    """A tokenizer of single bytes with one special token, 256."""

    table = [*(bytes([i]) for i in range(256)), None]

    def convert_ids_to_tokens(self, i):
        return "<|end|>"


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=20), st.integers(0, 3))
def test_characters_of_several_tokens_stand_at_the_last(text, cut):
    ids = list(text.encode())
    ids = ids[: len(ids) - cut] if cut < len(ids) else ids
    with patch.object(scores, "vocabulary_bytes", lambda tokenizer: tokenizer.table):
        texts, unended, none = (token_texts(some, Bytes()) for some in ([*ids, 256], ids, []))
    assert len(texts) == len(ids) + 1 and "".join(texts) == bytes(ids).decode(errors="replace") + "<|end|>"
    assert "".join(unended) == bytes(ids).decode(errors="replace") and none == []


def test_only_the_first_samples_are_read_and_evenly():
    samples = pd.DataFrame({"problem": np.repeat(np.arange(100), 3), "sample": [2, 0, 1] * 100})
    chosen = chosen_samples(samples, 5)
    assert (
        chosen["problem"].tolist() == [0, 25, 50, 74, 99]
        and chosen["sample"].eq(0).all()
        and len(chosen_samples(samples, 1000)) == 100
    )


# ---- colours and text


@given(st.floats(0, 10), st.sampled_from(list(SCORES)), st.integers(1, 9))
def test_black_text_is_legible_on_every_colour(value, score, top):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        return np.dot(
            [0.2126, 0.7152, 0.0722],
            [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts],
        )

    for colour in (colour_of(score, value, float(top)), colour_of(score, np.nan, float(top))):
        assert (luminance(colour) + 0.05) / 0.05 >= 4.5


def test_scales_grow_darker_and_end():
    shades = [colour_of("kl", value, 2.0) for value in (0, 0.5, 1.0, 2.0, 9.0)]
    green = [int(shade[3:5], 16) for shade in shades]
    assert (
        green == sorted(green, reverse=True)
        and shades[3] == shades[4]
        and shades[0] == "#FFFFFF"
        and blend(1, "#D55E00") == "#D55E00"
    )
    tables = [
        pd.DataFrame(
            {
                "kl": np.linspace(0, 1, 101),
                "offset": pd.array([0, 3] + [pd.NA] * 99, dtype="Int16"),
                "distance": np.nan,
            }
        )
    ]
    assert (
        scale_max(tables, "kl") == pytest.approx(0.98)
        and scale_max(tables, "offset") == 3
        and scale_max(tables, "distance") == 1
    )
    assert "3 bytes" in legend_html("offset", 3.0) and "0.98" in legend_html("kl", 0.98)


@given(st.text(max_size=30), st.sampled_from(list(SCORES)))
def test_any_text_is_text(text, score):
    seen = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attributes):
            seen.append((tag, [name for name, _ in attributes]))

        def handle_data(self, data):
            seen.append(data)

    reader = Reader()
    reader.feed(token_html(text + EVIL, score, 1.0, 2.0, 3))
    reader.close()
    assert [one for one in seen if isinstance(one, tuple)] == [("span", ["style", "title"])]
    assert (
        "".join(one for one in seen if isinstance(one, str)).replace("⏎\n", "\n").replace("⇥\t", "\t")
        == (text + EVIL)
        or "⏎" in text
        or "⇥" in text
        or "\r" in text
        or "\0" in text
    )


def test_long_responses_keep_their_ends():
    tokens = pd.DataFrame({"text": [f"t{i} " for i in range(5000)], "kl": 0.1, "position": range(5000)})
    page = text_html(tokens, "kl", 1.0)
    assert (
        page.count("<span") == 2000
        and "t499 " in page
        and "t500 " not in page
        and "t3500 " in page
        and "3,000 tokens left out" in page
    )


def test_letters_wrap_and_keep_their_token():
    tokens = pd.DataFrame({"text": ["ab", "cde\n", "<"], "kl": [1.0, 2.0, np.nan]})
    values, signs = letters(tokens, "kl", 4)
    assert signs.tolist() == [["a", "b", "c", "d"], ["e", "⏎", "", ""], ["&lt;", "", "", ""]]
    assert np.array_equal(
        values, [[1, 1, 2, 2], [2, 2, np.nan, np.nan], [-1, np.nan, np.nan, np.nan]], equal_nan=True
    )


@pytest.mark.parametrize(
    ("score", "values"), [("kl", [0.0, 2.0]), ("offset", pd.array([pd.NA, 2], dtype="Int16"))]
)
def test_the_figure_has_the_pages_colours(score, values):
    tokens = pd.DataFrame({"text": ["a", "b"], score: values})
    fig = token_figure({"x": tokens}, score, 2.0, "title")
    heat = fig.data[0]
    for place, value in enumerate(values):
        share = (heat.z[0, place] - heat.zmin) / (heat.zmax - heat.zmin)
        assert next(colour for edge, colour in heat.colorscale if edge >= share - 1e-9) == colour_of(
            score, np.nan if pd.isna(value) else float(value), 2.0
        )


# ---- run folders


def scored(samples, seed):
    """Made-up scores, one token a character."""
    rng, parts = np.random.default_rng(seed), []
    for row in samples.itertuples():
        n = len(row.response)
        parts.append(
            pd.DataFrame(
                {
                    "problem": row.problem,
                    "sample": row.sample,
                    "position": range(n),
                    "text": list(row.response),
                    "kl": rng.exponential(0.3, n).astype("float32"),
                    "distance": rng.random(n).astype("float32"),
                    "offset": pd.array([0] * n, dtype="Int16"),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)


def run_with_tokens(folder, problems=12, evil=False):
    """A synthetic run whose responses are scored."""
    folder = synthetic_run(folder, "oprd", steps=5, problems=problems, samples=2)
    for seed, name in enumerate(("before", "after")):
        path = folder / "eval" / f"{name}.parquet"
        samples = pd.read_parquet(path)
        samples["response"] = EVIL if evil else samples["response"]
        samples.assign(
            tokens=samples["response"].map(len),
            prompt=EVIL if evil else samples["prompt"],
            answer=EVIL if evil else samples["answer"],
        ).to_parquet(path, index=False)
        save_tokens(scored(chosen_samples(pd.read_parquet(path), 8), seed), folder, name)
    return folder


def test_scores_of_a_real_evaluation_fit_its_samples(same, tmp_path):
    rollouts = some_rollouts(same)
    samples = pd.DataFrame(
        {
            "problem": range(7),
            "sample": 0,
            "token_ids": rollouts.responses(),
            "response": rollouts.texts(same.tokenizer),
        }
    )
    samples.loc[3, "token_ids"] = []
    table = score_samples(
        samples,
        rollouts.prompts,
        same.student,
        Teacher(same.teacher, same.teacher_tokenizer),
        same.tokenizer,
        most=4,
    )
    assert list(table) == ["problem", "sample", "position", "text", "kl", "distance", "offset"] and table[
        "problem"
    ].unique().tolist() == [0, 2, 4, 6]
    path = save_tokens(table, tmp_path, "after")
    assert path == tmp_path / "tokens" / "after.parquet" and [p.name for p in path.parent.iterdir()] == [
        "after.parquet"
    ]
    pd.testing.assert_frame_equal(load_tokens(tmp_path, "after"), table)
    with pytest.raises(ValueError, match="token_ids"):
        stored_rollouts(samples.drop(columns="token_ids"), rollouts.prompts, same.tokenizer)
    with pytest.raises(ValueError, match="distance"):
        save_tokens(table.drop(columns="distance"), tmp_path, "after")


def test_the_kinds_are_what_became_of_each_response(tmp_path):
    folder = run_with_tokens(tmp_path / "run")
    answers, right = (
        answers_of(folder),
        {
            name: pd.read_parquet(folder / "eval" / f"{name}.parquet").set_index(["problem", "sample"])[
                "correct"
            ]
            for name in ("before", "after")
        },
    )
    keys = answers.of_kind("all")
    assert len(keys) == 8 and keys == sorted(keys) and all(sample == 0 for _, sample in keys)
    assert answers.of_kind("wrong, then right") == [
        key for key in keys if not right["before"][key] and right["after"][key]
    ]
    assert answers.of_kind("right, then wrong") == [
        key for key in keys if right["before"][key] and not right["after"][key]
    ]
    assert sorted(answers.of_kind("right at the end") + answers.of_kind("wrong at the end")) == keys


def test_the_browser_follows_its_controls(tmp_path):
    browser = RolloutBrowser(run_with_tokens(tmp_path / "run"))
    pages = []
    for _ in range(8):
        pages.append(browser.page.value)
        browser.next.click()
    assert len(set(pages)) == 8 and browser.page.value == pages[0]
    browser.previous.click()
    assert browser.page.value == pages[-1] and "nats" in pages[0]
    browser.score.value = "distance"
    assert "1 − cosine" in browser.page.value and browser.page.value != pages[-1]
    browser.score.value = "offset"
    assert "boundary" in browser.page.value
    browser.kind.value = "wrong at the end"
    for _ in browser.listed:
        assert browser.page.value.count("✗ wrong") >= 1
        browser.next.click()
    browser.kind.value = "all"
    problem = browser.listed[5][0]
    browser.show(problem)
    assert f"Problem {problem}<" in browser.page.value and len(browser.figure().data) == 2
    with pytest.raises(ValueError, match="problem=999"):
        browser.show(999)


def test_an_empty_kind_is_said(tmp_path):
    folder = run_with_tokens(tmp_path / "run")
    for name in ("before", "after"):
        path = folder / "eval" / f"{name}.parquet"
        pd.read_parquet(path).assign(correct=True).to_parquet(path, index=False)
    browser = RolloutBrowser(folder)
    browser.kind.value = "right, then wrong"
    assert "no such responses" in browser.page.value and browser.count.value == "of 0"
    browser.next.click()
    browser.kind.value = "all"
    assert "Problem" in browser.page.value


def test_a_run_without_scores_is_read_in_black_and_white(tmp_path):
    folder = synthetic_run(tmp_path / "run", steps=5, problems=6, samples=2)
    browser = RolloutBrowser(folder)
    assert (
        len(browser.listed) == 12
        and browser.listed[:6] == [(i, 0) for i in range(6)]
        and browser.score.disabled
        and "No token of this run was scored" in browser.page.value
    )
    with pytest.raises(ValueError, match="not scored"):
        browser.figure()
    (folder / "eval" / "before.parquet").unlink()
    assert len(RolloutBrowser(folder).kind.options) == 3
    (folder / "eval" / "after.parquet").unlink()
    with pytest.raises(ValueError, match="oprd eval"):
        RolloutBrowser(folder)


def test_scores_of_other_responses_are_refused(tmp_path):
    folder = run_with_tokens(tmp_path / "run")
    save_tokens(load_tokens(folder, "after").query("position > 0"), folder, "after")
    with pytest.raises(ValueError, match="other responses"):
        RolloutBrowser(folder)
    path = folder / "eval" / "before.parquet"
    twice = pd.read_parquet(path)
    pd.concat([twice, twice.assign(set="other")]).to_parquet(path, index=False)
    with pytest.raises(ValueError, match="several sets"):
        RolloutBrowser(folder)


def test_a_large_run_opens_at_once(tmp_path):
    folder = synthetic_run(tmp_path / "run", steps=5, problems=5000, samples=4)
    for name in ("before", "after"):
        samples = pd.read_parquet(folder / "eval" / f"{name}.parquet")
        samples["response"] = [f"{i} " + "so it follows " * 107 for i in range(20_000)]
        samples.assign(tokens=1500).to_parquet(folder / "eval" / f"{name}.parquet", index=False)
        save_tokens(scored(chosen_samples(samples).assign(response="x" * 1500), 0), folder, name)
    start = time.perf_counter()
    browser = RolloutBrowser(folder)
    seconds = time.perf_counter() - start
    browser.next.click()
    print(f"\nopened in {seconds:.2f} s, next page in {time.perf_counter() - start - seconds:.2f} s")
    assert seconds < 6 and len(browser.listed) == 64


# ---- in a browser

NOTEBOOK = (
    """from oprd_nb.explore.rollouts import RolloutBrowser
RolloutBrowser({folder!r})""",
    "RolloutBrowser({evil!r})",
)


@pytest.mark.skipif(
    CHROMIUM is None or bool(os.environ.get("CI")), reason="needs Debian's chromium, and is not for CI"
)
def test_in_a_browser_it_switches_scores_and_problems(tmp_path):
    folders = {
        "folder": str(run_with_tokens(tmp_path / "run")),
        "evil": str(run_with_tokens(tmp_path / "evil", problems=4, evil=True)),
    }
    with opened(tmp_path, [source.format(**folders) for source in NOTEBOOK], 1300, 1100) as (
        page,
        playwright,
    ):
        expect, first = playwright.expect, page.locator(".jp-OutputArea").first
        expect(first.get_by_text("Problem 0", exact=False)).to_be_visible(timeout=180_000)
        token = first.locator("pre span[title]").first
        assert "nats" in first.text_content()
        colour, tip = (token.get_attribute(name) for name in ("style", "title"))
        first.get_by_role("button", name="representation distance").click()
        expect(first.get_by_text("1 − cosine", exact=False)).to_be_visible(timeout=150_000)
        assert token.get_attribute("title") != tip and token.get_attribute("style") != colour
        first.get_by_role("button", name="next").click()
        expect(first.get_by_text("Problem 0", exact=False)).to_have_count(0, timeout=150_000)
        expect(page.locator(".jp-OutputArea").nth(1).get_by_text("onerror", exact=False).first).to_be_visible(
            timeout=150_000
        )
        assert page.evaluate("window.hacked") is None
        if shots := os.environ.get("OPRD_SHOTS"):
            page.screenshot(path=f"{shots}/browse.png")
