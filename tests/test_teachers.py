"""A teacher is frozen, reads in evaluation mode, and is never part of the student's graph."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_qwen3
from peft import LoraConfig, get_peft_model

from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.prompts import PromptFormat
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher, asked_of_both, inherited_format, templates_differ, without_adapters


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


@pytest.mark.parametrize(
    ("student", "teacher", "differ"),
    [("a", "a", False), ("a", "b", True), (None, "b", True), ("a", None, False), (None, None, False)],
)
def test_templates_differ_where_the_teacher_has_another_one(student, teacher, differ):
    sides = (SimpleNamespace(chat_template=template) for template in (student, teacher))
    assert templates_differ(*sides) == differ


def test_a_teacher_without_a_format_takes_the_students_but_not_its_template(same):
    ours = PromptFormat(system="Add.", template="{{ messages[0].content }}")
    tokenizer = copy.deepcopy(same.tokenizer)
    assert inherited_format(tokenizer, tokenizer, None) is None
    assert inherited_format(tokenizer, tokenizer, ours) is None
    assert inherited_format(tokenizer, tokenizer, ours, own_prompts=True) == ours
    other = copy.deepcopy(tokenizer)
    other.chat_template += " "
    for own_prompts in (False, True):
        found = inherited_format(tokenizer, other, ours, own_prompts)
        assert found == PromptFormat(system="Add.", template=None)


def test_what_both_are_asked_is_one_text_unless_something_differs(same):
    tokenizer = same.tokenizer
    prompt = [{"role": "user", "content": "1+1"}]
    alike = asked_of_both(prompt, tokenizer, tokenizer)
    assert alike["student"] == alike["teacher"]
    other = copy.deepcopy(tokenizer)
    other.chat_template += "="
    differ = asked_of_both(prompt, tokenizer, other)
    assert differ["student"] == alike["student"] and differ["teacher"] == alike["student"] + "="
    told = asked_of_both(prompt, tokenizer, tokenizer, teacher_prompt=[{"role": "user", "content": "2+2"}])
    assert told["student"] == alike["student"] and "2+2" in told["teacher"] and "1+1" not in told["teacher"]
    formatted = asked_of_both(prompt, tokenizer, tokenizer, teacher_format=PromptFormat(system="3+3"))
    assert formatted["student"] == alike["student"] and "3+3" in formatted["teacher"]


def test_adapters_are_off_while_the_base_teaches_and_as_before_afterwards(same):
    student = get_peft_model(tiny_qwen3(3), LoraConfig(target_modules="all-linear")).train()
    layers = [layer for layer in student.modules() if hasattr(layer, "_disable_adapters")]
    layers[0]._disable_adapters = True
    before = [layer._disable_adapters for layer in layers]
    with without_adapters(student):
        assert all(layer._disable_adapters for layer in layers) and not student.training
    assert [layer._disable_adapters for layer in layers] == before and student.training
    student.eval()
    with without_adapters(student):
        pass
    assert not student.training
