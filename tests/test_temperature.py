"""Temperature is one thing: what rollouts are written at is what the loss compares."""

import pytest
import torch
from short_runs import short_run
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from oprd_nb.bench.methods import final_states
from oprd_nb.core import Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL, TopKKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer

LENGTH = 12


@pytest.fixture
def setting(same):
    """Rollouts of one length, so that TRL's last positions are the response."""
    written = HFSampler(same.student, same.tokenizer).sample(
        same.task.test["prompt"][:8], max_new_tokens=LENGTH, seed=1
    )
    whole = [r for r in range(len(written)) if int(written.response_lengths[r]) == LENGTH]
    return same, written.select(whole), Teacher(same.teacher, same.tokenizer)


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.7])
def test_full_kl_is_trl_s(setting, temperature):
    pair, rollouts, teacher = setting
    student_states, tokens = final_states(pair.student, rollouts, LENGTH)
    teacher_states, _ = final_states(pair.teacher, rollouts, LENGTH)
    expected = _chunked_divergence_loss(
        student_states,
        teacher_states,
        pair.student.get_output_embeddings().weight,
        pair.teacher.get_output_embeddings().weight,
        torch.ones_like(tokens),
        beta=1.0,
        temperature=temperature,
    )[0]
    loss, _ = loss_of(FullKL(), pair.student, teacher, rollouts, pair.tokenizer, temperature=temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def gradient(model, loss):
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("temperature", [0.3, 0.7])
def test_the_sampled_token_s_gradient_is_that_of_the_full_kl_in_expectation(setting, temperature):
    """Over every token that could follow one prefix, weighted by its probability at this temperature."""
    pair, rollouts, teacher = setting
    pair.student.double()
    pair.teacher.double()
    prompt = rollouts.prompt_ids()[0]
    vocabulary = range(pair.student.config.vocab_size)
    answers = [[token] for token in vocabulary]
    every = Rollouts.from_ids([prompt] * len(answers), answers, pair.tokenizer.pad_token_id)
    with torch.no_grad():
        logits = pair.student(torch.tensor([prompt])).logits[0, -1]
    weights = torch.softmax(logits / temperature, -1)
    expected = gradient(
        pair.student,
        loss_of(FullKL(), pair.student, teacher, every.select([0]), pair.tokenizer, temperature=temperature)[
            0
        ],
    )
    mean = torch.zeros_like(expected)
    for token in vocabulary:
        one = every.select([token])
        loss, _ = loss_of(
            SampledTokenKL(), pair.student, teacher, one, pair.tokenizer, temperature=temperature
        )
        mean += weights[token] * gradient(pair.student, loss)
    assert float((mean - expected).norm() / expected.norm()) < 1e-5


def test_hidden_states_have_no_temperature(setting):
    pair, rollouts, teacher = setting
    losses = [
        loss_of(Representation(), pair.student, teacher, rollouts, pair.tokenizer, temperature=t)[0].item()
        for t in (0.3, 1.0)
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("term", [FullKL(), SampledTokenKL(), TopKKL(4)], ids=lambda term: term.name)
def test_the_trainer_s_loss_is_at_the_temperature_of_its_rollouts(setting, term, tmp_path):
    pair, rollouts, teacher = setting
    few = rollouts.select(range(4))
    expected, _ = loss_of(term, embedded("same").student, teacher, few, pair.tokenizer, temperature=0.7)
    trainer = OPRDTrainer(
        model=pair.student,
        teacher=teacher,
        objective=term,
        args=short_run(
            tmp_path,
            max_steps=1,
            temperature=0.7,
            per_device_train_batch_size=4,
            max_completion_length=LENGTH,
            logprob_tolerance=float("inf"),
        ),
        train_dataset=pair.task.test.select(range(len(few))),
        processing_class=pair.tokenizer,
        sampler=ReplaySampler(few, pair.tokenizer),
    )
    trainer.train_dataset = trainer.train_dataset.from_list(
        [{"prompt": p, "answer": ""} for p in few.prompts]
    )
    trainer.train()
    logged = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert logged == pytest.approx(expected.item(), rel=1e-3, abs=2e-4)
