"""Selections and the rollout batch, on inputs one would not write by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from oprd_nb.core import Layers, Positions, Rollouts, set_seed


def naive_positions(spec, lengths, time, offset):
    """Written token by token: which response tokens does `spec` mean?"""
    mask = torch.zeros(len(lengths), time, dtype=torch.bool)
    for b, n in enumerate(lengths):
        side, _, count = spec.partition(":")
        k = (
            n
            if spec == "all"
            else 1
            if spec == "last"
            else -(-n * int(count[:-1]) // 100)
            if count.endswith("%")
            else int(count)
        )
        chosen = range(min(k, n)) if side == "first" else range(max(0, n - k), n)
        for i in chosen:
            mask[b, offset[b] + i] = True
    return mask


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=5),
    st.sampled_from(["all", "last", "last:3", "first:4", "last:30%", "first:75%", "last:100%"]),
    st.integers(1, 4),
    st.booleans(),
)
def test_positions_agree_with_counting_by_hand(lengths, spec, prompt, left):
    time = prompt + max(lengths) + 2
    offset = [time - n if left else prompt for n in lengths]
    response = naive_positions("all", lengths, time, offset)
    expected = naive_positions(spec, lengths, time, offset)
    assert torch.equal(Positions(spec).mask(response), expected)
    assert torch.equal(Positions(spec, predicting=True).mask(response), torch.roll(expected, -1, dims=1))


def test_positions_count_tokens_not_columns():
    """A tool's answer in the middle of a response is no token of the student's."""
    response = torch.tensor([[False, True, True, False, False, True]])
    assert Positions("last:2").mask(response).tolist() == [[False, False, True, False, False, True]]


@pytest.mark.parametrize("spec", ["", "last:0", "last:", "middle:3", "first:101%", "last:-3", "last:2.5"])
def test_unknown_positions_name_the_way_out(spec):
    with pytest.raises(ValueError, match="positions=.*use 'all'"):
        Positions(spec)


@pytest.mark.parametrize("spec", ["29", "0", "x", "", "1,,2", [0], [29], []])
def test_unknown_layers_name_the_way_out(spec):
    with pytest.raises(ValueError, match="layers="):
        Layers(spec).of(28)


@given(st.integers(1, 60))
def test_even_and_odd_layers_partition_all(depth):
    odd = Layers("odd").of(depth)
    even = Layers("even").of(depth) if depth > 1 else []
    assert sorted(odd + even) == Layers("all").of(depth) and all(layer % 2 == 0 for layer in even)


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 9), min_size=1, max_size=4),
            st.lists(st.integers(0, 9), min_size=1, max_size=6),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(["left", "right"]),
    st.integers(0, 9),
)
def test_a_batch_gives_back_what_went_in_whatever_the_pad(pairs, side, pad):
    prompts, responses = [p for p, _ in pairs], [r for _, r in pairs]
    rollouts = Rollouts.from_ids(prompts, responses, pad, side=side)
    assert rollouts.prompt_ids() == prompts and rollouts.responses() == responses
    assert rollouts.truncated([7]).tolist() == [r[-1] != 7 for r in responses]


def test_masks_must_agree():
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="never padding"):
        Rollouts(ids, torch.tensor([[False, True, True]]), torch.tensor([[True, True, True]]))
    with pytest.raises(ValueError, match="differ"):
        Rollouts(ids, torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 2, dtype=torch.bool))


def test_a_torn_file_is_refused(tmp_path):
    path = Rollouts.from_ids([[1]], [[2, 3]], 0).save(tmp_path / "batch.safetensors")
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ValueError, match="cannot be read as rollouts"):
        Rollouts.load(path)
    with pytest.raises(ValueError, match="cannot be read as rollouts"):
        Rollouts.load(tmp_path / "missing.safetensors")


def test_seed_out_of_range():
    with pytest.raises(ValueError, match="seed=-1"):
        set_seed(-1)
