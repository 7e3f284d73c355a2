"""A teacher is frozen, reads in evaluation mode, and is never part of the student's graph."""

import pytest
import torch
from conftest import tiny_qwen3

from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher


@pytest.fixture(scope="module")
def written():
    pair = embedded("same")
    return HFSampler(pair.student, pair.tokenizer).sample(pair.task.test["prompt"][:3], max_new_tokens=12)


def training_teacher():
    """A model as training code leaves it: in train mode, with attention dropout, every weight trainable."""
    model = tiny_qwen3(3).train().requires_grad_(True)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.5
    return model


def test_a_teacher_is_frozen_and_in_evaluation_mode_at_once(same):
    model = training_teacher()
    Teacher(model, same.tokenizer)
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_a_teacher_put_back_into_train_mode_reads_without_dropout(same, written):
    teacher = Teacher(training_teacher(), same.tokenizer)
    pairs = teacher.read(written, same.tokenizer)
    rows = {2: pairs.teacher_rows}
    expected = teacher.capture(pairs, rows)[2]
    teacher.model.train()
    assert torch.equal(teacher.capture(pairs, rows)[2], expected)


@pytest.mark.parametrize("term", [Representation(), FullKL()], ids=["representation", "full"])
def test_a_teacher_made_trainable_again_is_not_in_the_graph(term, same, written):
    teacher = Teacher(same.teacher, same.tokenizer)
    teacher.model.model.requires_grad_(True)
    loss, _ = loss_of(term, same.student.requires_grad_(True), teacher, written, same.tokenizer)
    loss.backward()
    assert loss.item() > 0 and all(p.grad is None for p in teacher.model.parameters())


def test_captured_states_carry_no_graph(same, written):
    teacher = Teacher(same.teacher, same.tokenizer)
    teacher.model.requires_grad_(True)
    pairs = teacher.read(written, same.tokenizer)
    with torch.enable_grad():
        states = teacher.capture(pairs, {1: pairs.teacher_rows})[1]
    assert not states.requires_grad


def test_a_teacher_does_not_scale_losses(same):
    assert Teacher(same.teacher, same.tokenizer).loss_scale == 1.0
