"""Batches cut by length: nothing lost, nothing moved, the budget kept, the gradient unchanged."""

import pytest
import torch
from conftest import tiny_qwen3
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd_nb.core import Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.terms import as_objective
from oprd_nb.pairing.positions import identity_pairs
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher
from oprd_nb.training.batching import MicroBatch, bucket_by_length, micro_batches, trim_padding


@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 2000))
@settings(max_examples=200, deadline=None)
def test_groups_keep_the_budget_and_every_member(lengths, budget):
    groups = bucket_by_length(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or len(group) * max(lengths[i] for i in group) <= budget for group in groups)
    longest = [max(lengths[i] for i in group) for group in groups]
    assert longest == sorted(longest)


@pytest.mark.parametrize("budget", [0, -5])
def test_a_budget_of_nothing(budget):
    with pytest.raises(ValueError, match=f"token_budget={budget}"):
        bucket_by_length([3], budget)


def ragged(side):
    torch.manual_seed(0)

    def ids(n):
        return torch.randint(4, 20, (n,)).tolist()

    return Rollouts.from_ids(
        [ids(n) for n in (9, 2, 5, 3)],
        [ids(n) for n in (1, 30, 4, 12)],
        0,
        [[{"role": "user", "content": str(i)}] for i in range(4)],
        side,
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_part_says_what_the_whole_said(side):
    rollouts = ragged(side)
    for part, pairs in micro_batches(rollouts, identity_pairs(rollouts), 40):
        at = [int(prompt[0]["content"]) for prompt in part.prompts]
        assert part.responses() == [rollouts.responses()[i] for i in at] and part.prompt_ids() == [
            rollouts.prompt_ids()[i] for i in at
        ]
        assert part.attention_mask.any(0).all() and torch.equal(
            pairs.teacher_inputs.input_ids, part.input_ids
        )
        rows = pairs.student_rows
        assert torch.equal(
            part.input_ids.flatten()[rows], pairs.teacher_inputs.input_ids.flatten()[pairs.teacher_rows]
        )


@pytest.mark.filterwarnings("ignore:only .* of the student's tokens")
@pytest.mark.parametrize("budget", [50, 120, 10_000])
def test_pairs_of_another_tokenizer_move_along(budget):
    """At each position, the teacher's token that is paired with the student's is the one before the cut."""
    pair = embedded("cross_tokenizer")
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.train["prompt"][:12], max_new_tokens=40, seed=3
    )
    pairs = Teacher(pair.teacher, pair.teacher_tokenizer).read(rollouts, pair.tokenizer)

    def beside(batch, its):
        rows, other = its.student_rows, its.teacher_rows
        found = zip(
            (rows // batch.input_ids.shape[1]).tolist(),
            batch.input_ids.flatten()[rows].tolist(),
            its.teacher_inputs.input_ids.flatten()[other].tolist(),
            its.offset.tolist(),
            strict=True,
        )
        by_response = {}
        for response, mine, theirs, offset in found:
            by_response.setdefault(
                str(batch.prompts[response]) + str(batch.responses()[response]), []
            ).append((mine, theirs, offset))
        return by_response

    parts = {}
    for part, its in micro_batches(rollouts, pairs, budget):
        parts |= beside(part, its)
    assert parts == beside(rollouts, pairs)


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_gradient_does_not_change(side, reduction):
    rollouts, tokenizer = ragged(side), embedded("same").tokenizer
    student, teacher = (
        tiny_qwen3(vocab_size=40, seed=1).double(),
        Teacher(tiny_qwen3(vocab_size=40, seed=2).double(), tokenizer),
    )
    objective = (FullKL() + 2 * Representation(positions="last:3")).with_reduction(reduction)
    counts = as_objective(objective).counts(identity_pairs(rollouts))

    def gradient(parts):
        student.zero_grad()
        for part in parts:
            loss_of(objective, student, teacher, part, tokenizer, counts)[0].backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    whole = gradient([rollouts])
    assert torch.allclose(
        gradient([part for part, _ in micro_batches(rollouts, identity_pairs(rollouts), 30)]),
        whole,
        atol=1e-10,
    )


def test_trimming_keeps_holes():
    """TRL pads prompts on the left and responses on the right; a column between is kept while it is used."""
    ids = torch.arange(12).reshape(2, 6)
    attention = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 0, 1, 1, 1, 0]]).bool()
    response = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]]).bool()
    part, columns = trim_padding(Rollouts(ids, attention, response), torch.tensor([0, 1]))
    assert columns == slice(1, 5) and part.input_ids.tolist() == [[1, 2, 3, 4], [7, 8, 9, 10]]


def test_parts_of_a_micro_batch_are_whole_without_a_budget():
    rollouts = ragged("left")
    batch = MicroBatch(rollouts, identity_pairs(rollouts), torch.tensor([1]))
    assert batch.parts(0)[0] is batch
    parts = batch.parts(int(rollouts.attention_mask.sum(1).max()))
    assert len(parts) > 1
    assert sum(len(part.rollouts) for part in parts) == len(rollouts)


def test_a_micro_batch_goes_through_trls_batch():
    rollouts = ragged("left")
    batch = MicroBatch(rollouts, identity_pairs(rollouts), torch.tensor([5, 7]))
    back = MicroBatch.from_batch(batch.to_batch(), rollouts, num_terms=2)
    assert back.counts.tolist() == [5, 7]
    assert torch.equal(back.pairs.teacher_positions, batch.pairs.teacher_positions)
