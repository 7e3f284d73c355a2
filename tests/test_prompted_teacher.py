"""A teacher that is asked something else reads the same response: rows, states, errors, and a run."""

from dataclasses import replace

import pytest
import torch
from short_runs import short_run

from oprd_nb.core import Positions
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.prompts import encode_prompts
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher
from oprd_nb.training.diagnostics import output_diagnostics
from oprd_nb.training.trainer import OPRDTrainer


def longer(messages):
    return [{"role": "user", "content": "11+22+33=66 " + messages[0]["content"]}]


@pytest.fixture
def rollouts(same):
    return HFSampler(same.student, same.tokenizer).sample(same.task.test["prompt"][:5], max_new_tokens=30)


def test_states_are_those_of_the_other_prompt_and_the_same_response(same, rollouts):
    teacher = Teacher(same.teacher, same.teacher_tokenizer, prompt=longer)
    pairs = teacher.read(rollouts, same.tokenizer)
    mask = Positions("all", predicting=True).mask(rollouts.response_mask)
    flat = mask.flatten().nonzero().squeeze(1)
    rows = teacher.capture(pairs, {2: pairs.teacher_rows_at(flat)})[2]
    at = 0
    for messages, response in zip(rollouts.prompts, rollouts.responses(), strict=True):
        prompt = encode_prompts(same.tokenizer, [longer(messages)])[0]
        states = same.teacher(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states[2][
            0
        ]
        assert torch.allclose(
            rows[at : at + len(response)],
            states[len(prompt) - 1 : len(prompt) - 1 + len(response)],
            atol=1e-4,
        )
        at += len(response)
    assert at == len(rows)


def test_an_unchanged_prompt_is_the_plain_teacher(same, rollouts):
    plain, asked = (
        Teacher(same.teacher, same.teacher_tokenizer),
        Teacher(same.teacher, same.teacher_tokenizer, prompt=lambda messages: messages),
    )
    assert output_diagnostics(same.student, asked, rollouts, same.tokenizer) == pytest.approx(
        output_diagnostics(same.student, plain, rollouts, same.tokenizer), abs=1e-5
    )
    assert asked.read(rollouts, same.tokenizer).coverage == 1


def test_prompts_as_ids_cannot_be_asked_anew(same, rollouts):
    teacher = Teacher(same.teacher, same.teacher_tokenizer, prompt=longer)
    with pytest.raises(ValueError, match="rollouts.prompts is None"):
        teacher.read(replace(rollouts, prompts=None), same.tokenizer)


@pytest.mark.parametrize("objective", [Representation(positions="all"), FullKL()], ids=["oprd", "opd-full"])
def test_a_student_learns_from_itself_with_a_better_prompt(same, objective, tmp_path):
    """The teacher holds the same weights as the student.

    Without a prompt of its own there is nothing to learn from it; with one, there is.
    """
    losses = {}
    for name, prompt in (("plain", None), ("asked", longer)):
        config = short_run(tmp_path / name, max_steps=2, max_completion_length=24)
        trainer = OPRDTrainer(
            model=same.student,
            teacher=Teacher(type(same.student)(same.student.config), same.tokenizer, prompt=prompt),
            objective=objective,
            args=config,
            train_dataset=same.task.train,
            processing_class=same.tokenizer,
        )
        trainer.teacher.model.load_state_dict(same.student.state_dict())
        trainer.train()
        losses[name] = trainer.state.log_history[0]["loss"]
    assert abs(losses["plain"]) < 1e-4 < losses["asked"]
