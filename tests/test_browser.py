"""Scores of tokens and the rollout browser: scores against a naive reference, text that cannot become markup,
and the controls, in Python and in a browser."""

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
from jupyter_page import opened

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
from oprd_nb.runs import RunPaths, read_run, synthetic_run
from oprd_nb.teachers import Teacher

EVIL = (
    "<img src=x onerror='window.hacked = 1'></span><script>window.hacked = 1</script>"
    '" onmouseover="window.hacked = 1'
)


class Mirror:
    """A bridge of one layer pair: the student's states as they are, the teacher's reversed; no offsets."""

    layer_pairs = [(2, 2)]
    offsets = (0,)
    written = None

    def project_student(self, layer, hidden):
        return hidden

    def project_teacher(self, layer, hidden, offsets=None):
        assert offsets is None or not offsets.any()
        return hidden.flip(-1)

    def check(self, student, teacher, tokenizer, final_norm):
        pass


TEXTS = [
    "1+2=3\n",
    "37+58=95\n95+94=189\n\\boxed{189}",
    "\\boxed{7}",
    "4",
    "99+99=198",
    "5+5=10\n10+1=11\n",
    "\\boxed{",
]


def some_rollouts(pair):
    """Responses of different lengths, right or wrong, without sampling."""
    tokenizer = pair.tokenizer
    messages = []
    prompts = []
    responses = []
    for i, text in enumerate(TEXTS):
        message = [{"role": "user", "content": f"{i}+1+2"}]
        encoded = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        ending = [tokenizer.eos_token_id] if i % 2 else []
        messages.append(message)
        prompts.append(encoded["input_ids"])
        responses.append(tokenizer(text, add_special_tokens=False)["input_ids"] + ending)
    return Rollouts.from_ids(prompts, responses, tokenizer.pad_token_id, messages)


def paired_layers(student_out, teacher_out, i, bridge):
    """The two states of position `i` in each compared layer."""
    if bridge:
        return [(student_out.hidden_states[2][0, i], teacher_out.hidden_states[2][0, i].flip(-1))]
    layers = zip(student_out.hidden_states[1:], teacher_out.hidden_states[1:], strict=True)
    return [(a[0, i], b[0, i]) for a, b in layers]


@torch.no_grad()
def reference(student, teacher, rollouts, bridge=False, predicting=False):
    """kl and distance of each token, one response at a time, one number at a time."""
    table = []
    for prompt, response in zip(rollouts.prompt_ids(), rollouts.responses(), strict=True):
        ids = torch.tensor([prompt + response])
        student_out = student(ids, output_hidden_states=True)
        teacher_out = teacher(ids, output_hidden_states=True)
        for i in range(len(prompt), len(prompt) + len(response)):
            p = student_out.logits[0, i - 1].double().softmax(-1).tolist()
            q = teacher_out.logits[0, i - 1].double().softmax(-1).tolist()
            kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
            states = paired_layers(student_out, teacher_out, i - predicting, bridge)
            cosines = [F.cosine_similarity(a, b, dim=0).item() for a, b in states]
            table.append((kl, 1 - np.mean(cosines)))
    return np.array(table)


@pytest.fixture
def teacher(same):
    return Teacher(same.teacher, same.teacher_tokenizer)


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
def test_scores_are_the_reference(same, teacher, term, options, max_tokens):
    rollouts = some_rollouts(same)
    table = score_tokens(same.student, teacher, rollouts, same.tokenizer, term, max_tokens)
    expected = reference(same.student, same.teacher, rollouts, **options)
    assert np.allclose(table[["kl", "distance"]], expected, atol=2e-4)
    assert table["offset"].eq(0).all()
    by_response = table.groupby("response")
    assert by_response.size().tolist() == rollouts.response_lengths.tolist()
    texts = by_response["text"].agg("".join).str.replace("<|end|>", "")
    assert texts.tolist() == rollouts.texts(same.tokenizer)
    assert (by_response["position"].diff().dropna() == 1).all()


def test_a_student_compared_with_itself_scores_nothing(same):
    itself = Teacher(same.student, same.tokenizer)
    table = score_tokens(same.student, itself, some_rollouts(same), same.tokenizer)
    assert table["kl"].abs().max() < 1e-6
    assert table["distance"].abs().max() < 1e-6


def test_scoring_leaves_the_student_as_it_was(same, teacher):
    same.student.train()
    before = {name: value.clone() for name, value in same.student.state_dict().items()}
    table = score_tokens(same.student, teacher, some_rollouts(same), same.tokenizer)
    assert len(table)
    assert same.student.training
    assert all(p.grad is None for p in same.student.parameters())
    assert all(torch.equal(value, before[name]) for name, value in same.student.state_dict().items())


def test_across_tokenizers_there_is_pairing_and_no_kl():
    pair = embedded("cross_tokenizer")
    rollouts = some_rollouts(pair)
    crossed = Teacher(pair.teacher, pair.teacher_tokenizer)
    table = score_tokens(pair.student, crossed, rollouts, pair.tokenizer, max_tokens=80)
    pairs = pair_positions(rollouts, pair.tokenizer, pair.teacher_tokenizer, min_coverage=0.0)
    offsets = pairs.offsets[rollouts.response_mask].tolist()
    paired = pairs.paired[rollouts.response_mask].tolist()
    expected = [offset if is_paired else None for offset, is_paired in zip(offsets, paired, strict=True)]
    assert [None if pd.isna(value) else value for value in table["offset"]] == expected
    assert table[["kl", "distance"]].isna().all(axis=None)
    assert set(table["offset"].dropna()) >= {0, 1}


def test_other_widths_need_a_bridge(same):
    wide = tiny_qwen3(vocab_size=same.student.config.vocab_size, width=64)
    table = score_tokens(same.student, Teacher(wide, same.tokenizer), some_rollouts(same), same.tokenizer)
    assert table["distance"].isna().all()
    assert table["kl"].gt(0).all()


# ---- text of tokens


class Bytes:
    """A tokenizer of single bytes with one special token, 256."""

    vocabulary = [*(bytes([i]) for i in range(256)), None]

    def convert_ids_to_tokens(self, i):
        return "<|end|>"


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=20), st.integers(0, 3))
def test_a_character_of_several_tokens_is_at_the_last(text, cut):
    ids = list(text.encode())
    if cut < len(ids):
        ids = ids[: len(ids) - cut]
    with patch.object(scores, "vocabulary_bytes", lambda tokenizer: tokenizer.vocabulary):
        ended = token_texts([*ids, 256], Bytes())
        unended = token_texts(ids, Bytes())
        empty = token_texts([], Bytes())
    decoded = bytes(ids).decode(errors="replace")
    assert len(ended) == len(ids) + 1
    assert "".join(ended) == decoded + "<|end|>"
    assert "".join(unended) == decoded
    assert empty == []


def test_only_the_first_samples_are_read_and_evenly():
    samples = pd.DataFrame({"problem": np.repeat(np.arange(100), 3), "sample": [2, 0, 1] * 100})
    chosen = chosen_samples(samples, 5)
    assert chosen["problem"].tolist() == [0, 25, 50, 74, 99]
    assert chosen["sample"].eq(0).all()
    assert len(chosen_samples(samples, 1000)) == 100


# ---- colours and text


def luminance(colour):
    """Relative luminance of a hex colour (WCAG 2)."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return np.dot([0.2126, 0.7152, 0.0722], linear)


@given(st.floats(0, 10), st.sampled_from(list(SCORES)), st.integers(1, 9))
def test_black_text_is_legible_on_every_colour(value, score, top):
    for shown in (value, np.nan):
        assert (luminance(colour_of(score, shown, float(top))) + 0.05) / 0.05 >= 4.5


def test_scales_grow_darker_and_end():
    shades = [colour_of("kl", value, 2.0) for value in (0, 0.5, 1.0, 2.0, 9.0)]
    green = [int(shade[3:5], 16) for shade in shades]
    assert green == sorted(green, reverse=True)
    assert shades[3] == shades[4]
    assert shades[0] == "#FFFFFF"
    assert blend(1, "#D55E00") == "#D55E00"
    offsets = pd.array([0, 3] + [pd.NA] * 99, dtype="Int16")
    tables = [pd.DataFrame({"kl": np.linspace(0, 1, 101), "offset": offsets, "distance": np.nan})]
    assert scale_max(tables, "kl") == pytest.approx(0.98)
    assert scale_max(tables, "offset") == 3
    assert scale_max(tables, "distance") == 1
    assert "3 bytes" in legend_html("offset", 3.0)
    assert "0.98" in legend_html("kl", 0.98)


class Collector(HTMLParser):
    """Tags with the names of their attributes, and text, as a browser would see them."""

    def __init__(self):
        super().__init__()
        self.tags = []
        self.texts = []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, [name for name, _ in attributes]))

    def handle_data(self, data):
        self.texts.append(data)


@given(st.text(max_size=30), st.sampled_from(list(SCORES)))
def test_any_text_is_text(text, score):
    reader = Collector()
    reader.feed(token_html(text + EVIL, score, 1.0, 2.0, 3))
    reader.close()
    assert reader.tags == [("span", ["style", "title"])]
    shown = "".join(reader.texts).replace("⏎\n", "\n").replace("⇥\t", "\t")
    # These characters are changed on the way, by the signs or by the parser.
    is_changed = any(character in text for character in "⏎⇥\r\0")
    assert shown == text + EVIL or is_changed


def test_long_responses_keep_their_ends():
    tokens = pd.DataFrame({"text": [f"t{i} " for i in range(5000)], "kl": 0.1, "position": range(5000)})
    page = text_html(tokens, "kl", 1.0)
    assert page.count("<span") == 2000
    assert "t499 " in page
    assert "t500 " not in page
    assert "t3500 " in page
    assert "3,000 tokens left out" in page


def test_letters_wrap_and_keep_their_token():
    tokens = pd.DataFrame({"text": ["ab", "cde\n", "<"], "kl": [1.0, 2.0, np.nan]})
    values, signs = letters(tokens, "kl", 4)
    assert signs.tolist() == [["a", "b", "c", "d"], ["e", "⏎", "", ""], ["&lt;", "", "", ""]]
    expected = [[1, 1, 2, 2], [2, 2, np.nan, np.nan], [-1, np.nan, np.nan, np.nan]]
    assert np.array_equal(values, expected, equal_nan=True)


@pytest.mark.parametrize(
    ("score", "values"), [("kl", [0.0, 2.0]), ("offset", pd.array([pd.NA, 2], dtype="Int16"))]
)
def test_the_figure_has_the_colours_of_the_page(score, values):
    tokens = pd.DataFrame({"text": ["a", "b"], score: values})
    heat = token_figure({"x": tokens}, score, 2.0, "title").data[0]
    for i, value in enumerate(values):
        share = (heat.z[0, i] - heat.zmin) / (heat.zmax - heat.zmin)
        drawn = next(colour for edge, colour in heat.colorscale if edge >= share - 1e-9)
        assert drawn == colour_of(score, np.nan if pd.isna(value) else float(value), 2.0)


# ---- run folders


def made_up_scores(samples, seed):
    """Scores without a model, one token per character."""
    rng = np.random.default_rng(seed)
    tables = []
    for row in samples.itertuples():
        n = len(row.response)
        columns = {
            "problem": row.problem,
            "sample": row.sample,
            "position": range(n),
            "text": list(row.response),
            "kl": rng.exponential(0.3, n).astype("float32"),
            "distance": rng.random(n).astype("float32"),
            "offset": pd.array([0] * n, dtype="Int16"),
        }
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def run_with_tokens(folder, problems=12, evil=False):
    """A synthetic run whose responses are scored."""
    folder = synthetic_run(folder, "oprd", steps=5, problems=problems, samples=2)
    for seed, name in enumerate(("before", "after")):
        path = RunPaths(folder).eval(name)
        samples = pd.read_parquet(path)
        if evil:
            samples = samples.assign(response=EVIL, prompt=EVIL, answer=EVIL)
        samples.assign(tokens=samples["response"].map(len)).to_parquet(path, index=False)
        save_tokens(made_up_scores(chosen_samples(pd.read_parquet(path), 8), seed), folder, name)
    return folder


def test_scores_of_a_real_evaluation_fit_its_samples(same, teacher, tmp_path):
    rollouts = some_rollouts(same)
    columns = {
        "problem": range(7),
        "sample": 0,
        "token_ids": rollouts.responses(),
        "response": rollouts.texts(same.tokenizer),
    }
    samples = pd.DataFrame(columns)
    samples.loc[3, "token_ids"] = []
    table = score_samples(samples, rollouts.prompts, same.student, teacher, same.tokenizer, most=4)
    assert list(table) == ["problem", "sample", "position", "text", "kl", "distance", "offset"]
    assert table["problem"].unique().tolist() == [0, 2, 4, 6]
    path = save_tokens(table, tmp_path, "after")
    assert path == tmp_path / "tokens" / "after.parquet"
    assert [p.name for p in path.parent.iterdir()] == ["after.parquet"]
    pd.testing.assert_frame_equal(load_tokens(tmp_path, "after"), table)
    with pytest.raises(ValueError, match="token_ids"):
        stored_rollouts(samples.drop(columns="token_ids"), rollouts.prompts, same.tokenizer)
    with pytest.raises(ValueError, match="distance"):
        save_tokens(table.drop(columns="distance"), tmp_path, "after")


def test_the_kinds_are_what_became_of_each_response(tmp_path):
    folder = run_with_tokens(tmp_path / "run")
    answers = answers_of(folder)
    correct = {}
    for name in ("before", "after"):
        samples = pd.read_parquet(RunPaths(folder).eval(name))
        correct[name] = samples.set_index(["problem", "sample"])["correct"]
    keys = answers.of_kind("all")
    assert len(keys) == 8
    assert keys == sorted(keys)
    assert all(sample == 0 for _, sample in keys)
    gained = [key for key in keys if not correct["before"][key] and correct["after"][key]]
    lost = [key for key in keys if correct["before"][key] and not correct["after"][key]]
    assert answers.of_kind("wrong, then right") == gained
    assert answers.of_kind("right, then wrong") == lost
    assert sorted(answers.of_kind("right at the end") + answers.of_kind("wrong at the end")) == keys


def test_the_browser_follows_its_controls(tmp_path):
    browser = RolloutBrowser(run_with_tokens(tmp_path / "run"))
    pages = []
    for _ in range(8):
        pages.append(browser.page.value)
        browser.next.click()
    assert len(set(pages)) == 8
    assert browser.page.value == pages[0]
    browser.previous.click()
    assert browser.page.value == pages[-1]
    assert "nats" in pages[0]

    browser.score.value = "distance"
    assert "1 − cosine" in browser.page.value
    assert browser.page.value != pages[-1]
    browser.score.value = "offset"
    assert "boundary" in browser.page.value

    browser.kind.value = "wrong at the end"
    for _ in browser.listed:
        assert "✗ wrong" in browser.page.value
        browser.next.click()
    browser.kind.value = "all"
    problem = browser.listed[5][0]
    browser.show(problem)
    assert f"Problem {problem}<" in browser.page.value
    assert len(browser.figure().data) == 2
    with pytest.raises(ValueError, match="problem=999"):
        browser.show(999)


def test_a_search_lists_what_has_the_words(tmp_path):
    folder = run_with_tokens(tmp_path / "run")
    browser = RolloutBrowser(folder)
    problem, sample = browser.listed[3]
    prompt = str(browser.answers.samples["before"].loc[(problem, sample), "prompt"])
    browser.search.value = f" {prompt.upper()} "
    assert (problem, sample) in browser.listed
    assert browser.count.value == f"of {len(browser.listed)}"
    assert f"Problem {browser.listed[0][0]}<" in browser.page.value
    browser.search.value = "no response says this"
    assert browser.listed == []
    assert "no such responses" in browser.page.value
    browser.search.value = ""
    assert len(browser.listed) == 8


def test_a_browser_opens_at_a_problem_and_arrow_keys_go_on(tmp_path):
    folder = run_with_tokens(tmp_path / "run")
    problems = [problem for problem, _ in RolloutBrowser(folder).listed]
    browser = RolloutBrowser(folder, problem=problems[4])
    assert f"Problem {problems[4]}<" in browser.page.value
    for by, place in ((1, 5), (-1, 4), (-1, 3)):
        browser.arrow_keys._handle_custom_msg({"kind": "step", "by": by}, [])
        assert f"Problem {problems[place]}<" in browser.page.value
    with pytest.raises(ValueError, match="problem=999"):
        RolloutBrowser(folder, problem=999)


def test_a_slider_plays_the_evaluations_of_a_training(tmp_path):
    """Problem and kind stay; the responses at the end, and the counts of each kind, are those of the step."""
    folder = synthetic_run(tmp_path / "run", steps=5, problems=6, samples=1)
    samples = pd.read_parquet(RunPaths(folder).eval("after"))
    for step, right in ((0, 0), (10, 2), (20, 5)):
        texts = samples["response"] + f" in step {step}"
        table = samples.assign(correct=samples["problem"] < right, response=texts)
        table.to_parquet(RunPaths(folder).eval_at(step), index=False)
    steps = read_run(folder).evals.steps
    browser = RolloutBrowser(folder, steps, problem=1)
    assert browser.when.layout.display == "flex" and RolloutBrowser(folder).when.layout.display == "none"
    browser.kind.value = "wrong, then right"
    browser.show(1)
    assert "in step 10" in browser.page.value and browser.count.value == "of 2"
    browser.when.value = "step-000020"
    assert "in step 0<" in browser.page.value and "in step 20<" in browser.page.value
    assert "in step 10" not in browser.page.value
    assert "Problem 1<" in browser.page.value and browser.count.value == "of 5"
    assert browser.kind.value == "wrong, then right"
    assert ("wrong, then right (5)", "wrong, then right") in browser.kind.options


def test_an_empty_kind_is_said(tmp_path):
    folder = run_with_tokens(tmp_path / "run")
    for name in ("before", "after"):
        path = RunPaths(folder).eval(name)
        pd.read_parquet(path).assign(correct=True).to_parquet(path, index=False)
    browser = RolloutBrowser(folder)
    browser.kind.value = "right, then wrong"
    assert "no such responses" in browser.page.value
    assert browser.count.value == "of 0"
    browser.next.click()
    browser.kind.value = "all"
    assert "Problem" in browser.page.value


def test_a_run_without_scores_is_read_in_black_and_white(tmp_path):
    folder = synthetic_run(tmp_path / "run", steps=5, problems=6, samples=2)
    browser = RolloutBrowser(folder)
    assert len(browser.listed) == 12
    assert browser.listed[:6] == [(i, 0) for i in range(6)]
    assert browser.score.disabled
    assert "No token of this run was scored" in browser.page.value
    with pytest.raises(ValueError, match="not scored"):
        browser.figure()
    RunPaths(folder).eval("before").unlink()
    assert len(RolloutBrowser(folder).kind.options) == 3
    RunPaths(folder).eval("after").unlink()
    with pytest.raises(ValueError, match="oprd eval"):
        RolloutBrowser(folder)


def test_scores_of_other_responses_are_refused(tmp_path):
    folder = run_with_tokens(tmp_path / "run")
    save_tokens(load_tokens(folder, "after").query("position > 0"), folder, "after")
    with pytest.raises(ValueError, match="other responses"):
        RolloutBrowser(folder)
    path = RunPaths(folder).eval("before")
    samples = pd.read_parquet(path)
    pd.concat([samples, samples.assign(set="other")]).to_parquet(path, index=False)
    with pytest.raises(ValueError, match="several sets"):
        RolloutBrowser(folder)


def test_a_large_run_opens_at_once(tmp_path):
    folder = synthetic_run(tmp_path / "run", steps=5, problems=5000, samples=4)
    for name in ("before", "after"):
        path = RunPaths(folder).eval(name)
        samples = pd.read_parquet(path)
        samples["response"] = [f"{i} " + "so it follows " * 107 for i in range(20_000)]
        samples.assign(tokens=1500).to_parquet(path, index=False)
        save_tokens(made_up_scores(chosen_samples(samples).assign(response="x" * 1500), 0), folder, name)
    start = time.perf_counter()
    browser = RolloutBrowser(folder)
    seconds = time.perf_counter() - start
    browser.next.click()
    print(f"\nopened in {seconds:.2f} s, next page in {time.perf_counter() - start - seconds:.2f} s")
    assert seconds < 6
    assert len(browser.listed) == 64


# ---- in a browser

NOTEBOOK = [
    """from oprd_nb.explore.rollouts import RolloutBrowser
RolloutBrowser({folder!r})""",
    "RolloutBrowser({evil!r})",
]


@pytest.mark.browser
def test_in_a_browser_it_switches_scores_and_problems(tmp_path):
    folders = {
        "folder": str(run_with_tokens(tmp_path / "run")),
        "evil": str(run_with_tokens(tmp_path / "evil", problems=4, evil=True)),
    }
    sources = [source.format(**folders) for source in NOTEBOOK]
    with opened(tmp_path, sources, 1300, 1100) as (page, playwright):
        expect = playwright.expect
        first = page.locator(".jp-OutputArea").first
        expect(first.get_by_text("Problem 0", exact=False)).to_be_visible(timeout=180_000)
        token = first.locator("pre span[title]").first
        assert "nats" in first.text_content()
        style = token.get_attribute("style")
        title = token.get_attribute("title")
        first.get_by_role("button", name="representation distance").click()
        expect(first.get_by_text("1 − cosine", exact=False)).to_be_visible(timeout=150_000)
        assert token.get_attribute("title") != title
        assert token.get_attribute("style") != style

        first.get_by_role("button", name="next").click()
        expect(first.get_by_text("Problem 0", exact=False)).to_have_count(0, timeout=150_000)

        first.locator("pre").first.click()
        page.keyboard.press("ArrowLeft")
        expect(first.get_by_text("Problem 0", exact=False)).to_be_visible(timeout=150_000)
        first.get_by_placeholder("search").fill("no response says this")
        expect(first.get_by_text("no such responses")).to_be_visible(timeout=150_000)
        first.get_by_placeholder("search").fill("")

        markup = page.locator(".jp-OutputArea").nth(1).get_by_text("onerror", exact=False).first
        expect(markup).to_be_visible(timeout=150_000)
        assert page.evaluate("window.hacked") is None
        if shots := os.environ.get("OPRD_SHOTS"):
            page.screenshot(path=f"{shots}/browse.png")
