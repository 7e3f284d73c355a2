"""The verdict on a pair: the rule, the object, and the folder that `oprd probe` writes."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd_nb import diagnosis
from oprd_nb.cli.probe import ProbeArguments, probe_pair
from oprd_nb.diagnosis import diagnose, read_tokens, recommend
from oprd_nb.explore.layers import LayerExplorer, RankExplorer
from oprd_nb.models.pairs import embedded
from oprd_nb.probing.similarity import cka
from oprd_nb.probing.states import collect, join_states
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher


@pytest.fixture(scope="module")
def pair():
    return embedded("same")


@pytest.fixture(scope="module")
def rollouts(pair):
    return HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.test["prompt"][:32], max_new_tokens=40, seed=3
    )


@pytest.fixture(scope="module")
def found(pair, rollouts):
    return diagnose(pair.student, Teacher(pair.teacher, pair.teacher_tokenizer), rollouts, pair.tokenizer)


@given(st.floats(-0.2, 0.95), st.floats(0, 1), st.integers(0, 64), st.floats(0, 1))
def test_the_rule(shuffled, way, rank, coverage):
    cosine = shuffled + way * (1 - shuffled)
    verdict = recommend((8, 8), cosine, shuffled, rank, 0.5, coverage)
    expected = "oprd" if way > 0.501 else "bridge" if rank and coverage >= 0.9 else "readout"
    assert verdict.method == expected or abs(way - 0.5) <= 0.001
    assert (verdict.rank == rank) == (verdict.method == "bridge") and "\n" not in str(verdict)
    assert recommend((8, 9), np.nan, np.nan, rank, 0.5, coverage).method == (
        "bridge" if rank and coverage >= 0.9 else "readout"
    )


def test_tables_agree_with_the_rooms_below(pair, rollouts, found):
    rows = join_states(
        collect(pair.student, Teacher(pair.teacher, pair.teacher_tokenizer), rollouts, pair.tokenizer)
    )
    assert (
        found.counts["asked"]
        == found.counts["paired"]
        == len(rows)
        == len(found.tokens)
        == int(rollouts.response_lengths.sum())
    )
    assert found.counts["sampled"] == len(rows) and 0.5 * len(rows) < found.counts["fitted"] < 0.8 * len(rows)
    assert np.allclose(
        found.layers.cka, [cka(rows.student[s], rows.teacher[t]) for s, t in rows.layer_pairs], atol=1e-8
    )
    assert np.allclose(found.layers.cosine, found.tokens[[1, 2, 3, 4]].mean()) and found.matrix.shape == (
        4,
        4,
    )
    assert (
        found.layers["rank"].tolist() == found.ranks.layers["rank"].tolist()
        and len(found.curve) == len(found.components) == 4 * 96
    )


def test_a_sample_is_a_sample_of_pairs(pair, rollouts, found, monkeypatch):
    monkeypatch.setattr(diagnosis, "SAMPLED", 400)
    monkeypatch.setattr(diagnosis, "NEIGHBOURS", 200)
    thin = diagnose(pair.student, Teacher(pair.teacher, pair.teacher_tokenizer), rollouts, pair.tokenizer)
    assert (
        thin.counts["sampled"] == 200
        and thin.counts["fitted"] == found.counts["fitted"]
        and thin.layers.cosine.equals(found.layers.cosine)
    )
    assert (abs(thin.layers.cka - found.layers.cka) < 0.1).all()


def test_the_same_call_gives_the_same_answer(pair, rollouts, found):
    again = diagnose(pair.student, Teacher(pair.teacher, pair.teacher_tokenizer), rollouts, pair.tokenizer)
    pd.testing.assert_frame_equal(again.layers, found.layers)
    assert str(again) == str(found)


def test_layers_and_positions_can_be_chosen(pair, rollouts):
    some = diagnose(
        pair.student,
        Teacher(pair.teacher, pair.teacher_tokenizer),
        rollouts,
        pair.tokenizer,
        layers="2,4",
        positions="last:4",
    )
    assert (
        some.layers.layer.tolist() == [2, 4]
        and some.counts["asked"] == 4 * len(rollouts)
        and some.matrix.shape == (2, 4)
    )
    assert some.figures().keys() == {"layers", "positions", "first_and_last_k", "cka", "rank", "rank_cosine"}


def test_it_shows_itself(found):
    text, markdown = str(found), found._repr_markdown_()
    for part in ("cosine", "CKA, debiased", "shared rank r*", "OPRD (Vanilla)"):
        assert part in text and part in markdown
    assert markdown.splitlines()[1] == "|---|---|"


def test_few_rows_are_said_to_be_few(pair, rollouts, found):
    few = diagnose(
        pair.student,
        Teacher(pair.teacher, pair.teacher_tokenizer),
        rollouts,
        pair.tokenizer,
        positions="last:6",
    )
    assert (
        "rows only" in str(few)
        and few.counts["fitted"] < 4 * 96 < found.counts["fitted"]
        and "rows only" not in str(found)
    )


def test_too_few_responses_are_refused(pair, rollouts):
    few = type(rollouts)(rollouts.input_ids[:5], rollouts.attention_mask[:5], rollouts.response_mask[:5])
    with pytest.raises(ValueError, match="rollouts: 5 responses"):
        diagnose(pair.student, Teacher(pair.teacher, pair.teacher_tokenizer), few, pair.tokenizer)


def test_probe_writes_a_folder_that_explorers_read(tmp_path):
    out = tmp_path / "deep" / "probe"
    result = probe_pair(
        ProbeArguments(
            "embedded/student", "embedded/teacher", "arithmetic", out=str(out), limit=12, max_new_tokens=40
        )
    )
    assert result.names == ("embedded/student", "embedded/teacher")
    assert (
        (out / "alignment.md")
        .read_text("utf-8")
        .startswith("| embedded/student ← embedded/teacher | measured |")
    )
    for name in ("layers", "positions", "cka", "rank"):
        page = (out / f"{name}.html").read_text("utf-8")
        assert 'src="plotly.min.js"' in page and "https://cdn" not in page
    explorer = LayerExplorer(read_tokens(out))
    explorer.response.value = 3
    assert explorer.map.data[0].z.shape[0] == 4
    assert RankExplorer(
        pd.read_csv(out / "components.csv"), pd.read_csv(out / "rank_curve.csv"), rank=5
    ).layer.options == (1, 2, 3, 4)


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
    } | wrong
    with pytest.raises(ValueError, match=message) as caught:
        probe_pair(ProbeArguments(**arguments, out=str(tmp_path / "out")))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_no_tokens_no_table(tmp_path):
    with pytest.raises(ValueError, match="has no tokens.parquet"):
        read_tokens(tmp_path)


def test_a_model_against_itself_has_nothing_to_learn(pair, rollouts):
    itself = diagnose(pair.student, Teacher(pair.student, pair.tokenizer), rollouts, pair.tokenizer)
    assert (
        itself.layers[["cosine", "cka", "mutual_knn", "norm_cosine", "token_structure"]].to_numpy().min()
        > 0.99
    )
    assert itself.verdict.method == "oprd" and np.isfinite(itself.curve.cosine).all()
