"""The diagnosis of a pair: the rule, the report, and the folder that `oprd probe` writes."""

from html import escape

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd_nb import diagnosis
from oprd_nb.cli.probe import ProbeArguments, probe_pair
from oprd_nb.diagnosis import Lead, Measured, diagnose, null_similarity, read_tokens, recommend, summary_lines
from oprd_nb.explore.layers import LayerExplorer, RankExplorer
from oprd_nb.models.pairs import embedded
from oprd_nb.probing.similarity import cka, mutual_knn
from oprd_nb.probing.states import collect, join_states
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.structure import ridge
from oprd_nb.teachers import Teacher
from oprd_nb.utils import results_folder


@pytest.fixture(scope="module")
def pair():
    return embedded("same")


@pytest.fixture(scope="module")
def teacher(pair):
    return Teacher(pair.teacher, pair.teacher_tokenizer)


@pytest.fixture(scope="module")
def rollouts(pair):
    sampler = HFSampler(pair.student, pair.tokenizer)
    return sampler.sample(pair.task.test["prompt"][:32], max_new_tokens=40, seed=3)


@pytest.fixture(scope="module")
def report(pair, teacher, rollouts):
    return diagnose(pair.student, teacher, rollouts, pair.tokenizer)


@given(st.floats(-0.2, 0.95), st.floats(0, 1), st.integers(0, 64), st.floats(0, 1))
def test_the_rule(shuffled, share, rank, coverage):
    cosine = shuffled + share * (1 - shuffled)
    recommended = recommend(Measured((8, 8), cosine, shuffled, rank, 0.5, coverage))
    without_cosine = "bridge" if rank and coverage >= 0.9 else "readout"
    expected = "oprd" if share > 0.501 else without_cosine
    assert recommended.method == expected or abs(share - 0.5) <= 0.001
    assert (recommended.rank == rank) == (recommended.method == "bridge")
    assert "\n" not in str(recommended)
    other_width = recommend(Measured((8, 9), np.nan, np.nan, rank, 0.5, coverage))
    assert other_width.method == without_cosine


def test_tables_agree_with_the_functions_they_come_from(pair, teacher, rollouts, report):
    states = join_states(collect(pair.student, teacher, rollouts, pair.tokenizer))
    counts = report.counts
    assert counts["requested"] == counts["paired"] == len(states) == len(report.tokens)
    assert len(states) == int(rollouts.response_lengths.sum())
    assert counts["sampled"] == len(states)
    assert 0.5 * len(states) < counts["fitted"] < 0.8 * len(states)
    expected = [cka(states.student[s], states.teacher[t]) for s, t in states.layer_pairs]
    assert np.allclose(report.layers["cka"], expected, atol=1e-8)
    assert np.allclose(report.layers["cosine"], report.tokens[[1, 2, 3, 4]].mean())
    assert report.matrix.shape == (4, 4)
    assert report.layers["rank"].tolist() == report.ranks.layers["rank"].tolist()
    assert len(report.curve) == len(report.components) == 4 * 96


def test_a_sample_is_a_sample_of_pairs(pair, teacher, rollouts, report, monkeypatch):
    monkeypatch.setattr(diagnosis, "SAMPLED", 400)
    monkeypatch.setattr(diagnosis, "NEIGHBOURS", 200)
    thin = diagnose(pair.student, teacher, rollouts, pair.tokenizer)
    assert thin.counts["sampled"] == 200
    assert thin.counts["fitted"] == report.counts["fitted"]
    assert thin.layers["cosine"].equals(report.layers["cosine"])
    assert (abs(thin.layers["cka"] - report.layers["cka"]) < 0.1).all()


def test_each_layer_pair_is_fitted_once(pair, teacher, rollouts, report, monkeypatch):
    calls = []
    fit_ridge = ridge.fit_ridge

    def counting(moments, *arguments, **settings):
        calls.append(moments)
        return fit_ridge(moments, *arguments, **settings)

    monkeypatch.setattr(ridge, "fit_ridge", counting)
    again = diagnose(pair.student, teacher, rollouts, pair.tokenizer)
    assert len(calls) == 4
    pd.testing.assert_frame_equal(again.curve, report.curve)


def test_the_same_call_gives_the_same_answer(pair, teacher, rollouts, report):
    again = diagnose(pair.student, teacher, rollouts, pair.tokenizer)
    pd.testing.assert_frame_equal(again.layers, report.layers)
    assert str(again) == str(report)


def test_layers_and_positions_can_be_chosen(pair, teacher, rollouts):
    some = diagnose(pair.student, teacher, rollouts, pair.tokenizer, layers="2,4", positions="last:4")
    assert some.layers["layer"].tolist() == [2, 4]
    assert some.counts["requested"] == 4 * len(rollouts)
    assert some.matrix.shape == (2, 4)
    expected = {"layers", "positions", "first_and_last_k", "cka", "rank", "rank_cosine"}
    assert some.figures().keys() == expected


def test_it_shows_itself(report):
    text = str(report)
    markdown = report._repr_markdown_()
    for part in ("cosine", "CKA, debiased", "shared rank r*", "OPRD (Vanilla)"):
        assert part in text and part in markdown
    assert markdown.splitlines()[1] == "|---|---|"


def test_few_states_are_reported_as_few(pair, teacher, rollouts, report):
    few = diagnose(pair.student, teacher, rollouts, pair.tokenizer, positions="last:6")
    assert few.counts["fitted"] < 4 * 96 < report.counts["fitted"]
    assert "tokens only" in str(few)
    assert "tokens only" not in str(report)


def test_too_few_responses_are_refused(pair, teacher, rollouts):
    few = type(rollouts)(rollouts.input_ids[:5], rollouts.attention_mask[:5], rollouts.response_mask[:5])
    with pytest.raises(ValueError, match="rollouts: 5 responses"):
        diagnose(pair.student, teacher, few, pair.tokenizer)


def test_probe_writes_a_folder_that_explorers_read(tmp_path):
    out = tmp_path / "deep" / "probe"
    arguments = ProbeArguments(
        "embedded/student", "embedded/teacher", "arithmetic", out=str(out), limit=12, max_new_tokens=40
    )
    result = probe_pair(arguments)
    assert result.names == ("embedded/student", "embedded/teacher")
    page = (out / "report.html").read_text("utf-8")
    assert "<h1>embedded/student ← embedded/teacher</h1>" in page
    assert "<script src" not in page and "https://cdn" not in page.split("<script>")[0]
    for name in result.figures():
        assert f"<div class='plot' id='{name}'" in page
    for answer in summary_lines(result).values():
        assert escape(answer) in page
    assert [path.name for path in out.iterdir() if path.suffix == ".html"] == ["report.html"]
    explorer = LayerExplorer(read_tokens(out))
    explorer.response.value = 3
    assert explorer.map.data[0].z.shape[0] == 4
    components = pd.read_csv(out / "components.csv")
    curve = pd.read_csv(out / "rank_curve.csv")
    assert RankExplorer(components, curve, rank=5).layer.options == (1, 2, 3, 4)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layers": "9"}, "layers='9'"),
        ({"positions": "middle"}, "positions='middle'"),
        ({"student": "/nowhere/model"}, "model='/nowhere/model'"),
        ({"prompts": "nowhere"}, "task='nowhere'"),
        ({"teacher": "embedded/nobody"}, "embedded/nobody"),
        ({"limit": 3}, "rollouts: 3"),
    ],
)
def test_a_bad_argument_is_one_line_and_leaves_nothing_behind(tmp_path, wrong, message):
    arguments = {
        "student": "embedded/student",
        "teacher": "embedded/teacher",
        "prompts": "arithmetic",
        "limit": 8,
        "max_new_tokens": 10,
    }
    with pytest.raises(ValueError, match=message) as caught:
        probe_pair(ProbeArguments(**(arguments | wrong), out=str(tmp_path / "out")))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_no_tokens_no_table(tmp_path):
    with pytest.raises(ValueError, match="has no tokens.parquet"):
        read_tokens(tmp_path)


def test_a_model_against_itself_has_nothing_to_learn(pair, rollouts):
    itself = diagnose(pair.student, Teacher(pair.student, pair.tokenizer), rollouts, pair.tokenizer)
    agreement = itself.layers[["cosine", "cka", "mutual_knn", "norm_cosine", "token_structure"]]
    assert agreement.to_numpy().min() > 0.99
    assert itself.recommendation.method == "oprd"
    assert np.isfinite(itself.curve["cosine"]).all()


BRIDGED = Measured((8, 9), np.nan, np.nan, 4, 0.8, 1.0)


def test_where_a_vocabulary_is_shared_the_output_space_is_named_with_stored_numbers():
    recommended = recommend(BRIDGED._replace(shared_vocabulary=True))
    assert recommended.method == "opd-full" and recommend(BRIDGED).method == "bridge"
    assert recommended.title == "Distillation in output space, or a readout bridge"
    stored = (
        pd.read_csv(results_folder() / "cross_architecture_final.csv").groupby("method")["accuracy"].mean()
    )
    best_bridge = stored[
        [name for name in stored.index if name.startswith("bridge") and ">" not in name]
    ].max()
    for accuracy in (stored["opd-full"], best_bridge, stored["readout"]):
        assert f"{accuracy:.1%}" in str(recommended)


@pytest.mark.parametrize(
    "student, teacher, words",
    [(2, 38, ""), (20, 20, "not shown to be better here"), (38, 2, "answers these problems worse")],
)
def test_a_teacher_that_is_not_better_is_doubted(student, teacher, words):
    rights = [[i < right for i in range(40)] for right in (student, teacher)]
    recommended = recommend(BRIDGED._replace(lead=Lead.of(*rights)))
    assert words in recommended.doubt and bool(recommended.doubt) == bool(words)
    assert "40 problems" in str(Lead.of(*rights)) and str(recommended).endswith(recommended.doubt)


def test_the_null_is_that_of_states_that_were_moved():
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(50, 6, generator=generator)
    teacher = torch.cat([student, torch.randn(50, 3, generator=generator)], dim=1)
    moved = [teacher.roll(50 * (i + 1) // 5, 0) for i in range(4)]
    naive = max(cka(student, other) for other in moved), max(mutual_knn(student, other) for other in moved)
    assert null_similarity(student, teacher) == pytest.approx(naive, abs=1e-6)
