"""Whatever is not finite: it never reaches the weights, and the log says where it came from."""

import copy
import json
import math
import warnings

import pytest
import torch
from short_runs import short_run
from transformers import TrainerCallback

from oprd_nb.models.checks import not_finite
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL, TopKKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer

TERMS = [Representation(positions="all"), FullKL(), TopKKL(4), SampledTokenKL()]
RESPONSES = 16


class Recorded(OPRDTrainer):
    """Keeps the batches of all passes."""

    def compute_loss(self, model, inputs, *rest, **options):
        self.seen = [*getattr(self, "seen", []), inputs]
        return super().compute_loss(model, inputs, *rest, **options)


class KeptGradients(TrainerCallback):
    """Keeps the gradients of the first step."""

    def __init__(self):
        self.kept = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        if not self.kept:
            self.kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(folder, pair, term, sampler=None, callbacks=(), **changes):
    """A run of up to three steps of 16 responses; the trainer, the warnings, and what ended it."""
    trainer = Recorded(
        model=pair.student.requires_grad_(True),
        teacher=Teacher(pair.teacher, pair.teacher_tokenizer),
        objective=term,
        args=short_run(folder, **(dict(per_device_train_batch_size=RESPONSES) | changes)),
        train_dataset=pair.task.train.select(range(64)),
        processing_class=pair.tokenizer,
        sampler=sampler,
        callbacks=list(callbacks),
    )
    ended = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.train()
        except ValueError as error:
            ended = error
    return trainer, [str(warning.message) for warning in caught], ended


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Spoiled:
    """A forward hook that spoils the first response of a full batch of the first training pass.

    Once it has been left out the batch is smaller, and nothing is spoiled.
    """

    def __init__(self, value, only_with_gradients):
        self.value = value
        self.only_with_gradients = only_with_gradients
        self.times = 0

    def __call__(self, module, inputs, hidden):
        if self.only_with_gradients and not torch.is_grad_enabled():
            return hidden
        if len(hidden) < RESPONSES or self.times:
            return hidden
        self.times += 1
        first = torch.zeros(len(hidden), dtype=torch.bool)
        first[0] = True
        return hidden.masked_fill(first[:, None, None], self.value)


def replayed(pair):
    prompts = pair.task.train["prompt"][:64]
    return ReplaySampler(
        HFSampler(pair.student, pair.tokenizer).sample(prompts, max_new_tokens=30), pair.tokenizer
    )


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_a_response_with_broken_states_is_left_out_and_named(term, side, value, same, tmp_path):
    sampler = replayed(same)
    hook = Spoiled(value, only_with_gradients=side == "student")
    model = same.student if side == "student" else same.teacher
    model.model.layers[1].register_forward_hook(hook)
    trainer, said, ended = trained(tmp_path, same, term, sampler, max_steps=2, logprob_tolerance=math.inf)
    assert ended is None and hook.times == 1
    assert not not_finite(trainer.model)
    first, second = (line for line in lines(tmp_path) if "loss" in line)
    assert first["response/nonfinite"] == 1 / RESPONSES and second["response/nonfinite"] == 0
    assert first["step/skipped"] == 0 and math.isfinite(first["loss"]) and first["grad_norm"] > 0
    (warning,) = [text for text in said if "not finite" in text]
    assert f"step 1: 1 of {RESPONSES} responses" in warning and "answers" in warning


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_a_live_run_goes_on(term, same, tmp_path):
    same.student.model.layers[1].register_forward_hook(Spoiled(math.nan, only_with_gradients=True))
    trainer, _, ended = trained(tmp_path, same, term, max_steps=2)
    assert ended is None and not not_finite(trainer.model)
    assert [line["response/nonfinite"] for line in lines(tmp_path) if "loss" in line] == [1 / RESPONSES, 0]


def test_the_layer_and_the_side_are_named(same, tmp_path):
    def spoil_this_prompt(module, inputs, hidden):
        cursed = hidden.new_zeros(len(hidden), dtype=torch.bool)
        cursed[0] = len(hidden) in (1, RESPONSES)
        return hidden.masked_fill(cursed[:, None, None], math.nan)

    same.teacher.model.layers[2].register_forward_hook(spoil_this_prompt)
    _, said, ended = trained(tmp_path, same, Representation(positions="all"), max_steps=1)
    assert ended is None
    assert any("the teacher's states, layer 3" in text for text in said)


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_the_step_is_that_of_the_other_responses(term, same, tmp_path):
    student = copy.deepcopy(same.student)
    teacher = Teacher(same.teacher, same.teacher_tokenizer)
    sampler = replayed(same)
    gradients = KeptGradients()
    same.student.model.layers[1].register_forward_hook(Spoiled(math.nan, only_with_gradients=True))
    trainer, _, ended = trained(
        tmp_path,
        same,
        term,
        sampler,
        callbacks=[gradients],
        max_steps=1,
        max_grad_norm=0.0,
        logprob_tolerance=math.inf,
    )
    assert ended is None
    kept = gradients.kept
    rollouts = trainer.seen[0].rollouts.select(range(1, RESPONSES))
    loss, _ = loss_of(term, student.requires_grad_(True), teacher, rollouts, same.tokenizer)
    loss.backward()
    names = [name for name, p in student.named_parameters() if p.grad is not None and name in kept]
    assert len(names) > 10
    for name in names:
        torch.testing.assert_close(kept[name], student.get_parameter(name).grad, rtol=1e-3, atol=1e-6)
    logged = next(line["loss"] for line in lines(tmp_path) if "loss" in line)
    assert logged == pytest.approx(loss.item(), rel=1e-4)


def test_under_a_token_budget_and_accumulation_too(same, tmp_path):
    changes = dict(per_device_train_batch_size=RESPONSES // 2, gradient_accumulation_steps=2, max_steps=2)
    spoiled = []

    class LossOfOne(Representation):
        def per_position(self, inputs):
            losses, metrics = super().per_position(inputs)
            if not spoiled:
                spoiled.append(True)
                losses = torch.cat([losses[:1] * math.inf, losses[1:]])
            return losses, metrics

    trainer, said, ended = trained(tmp_path, same, LossOfOne(positions="all"), token_budget=200, **changes)
    assert ended is None and not not_finite(trainer.model)
    first, second = (line for line in lines(tmp_path) if "loss" in line)
    assert first["response/nonfinite"] == 1 / RESPONSES and second["response/nonfinite"] == 0
    assert "grad/snr" not in first and "grad/snr" in second
    assert any("the loss, answers" in text for text in said)


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_a_broken_gradient_skips_its_step(term, same, tmp_path):
    times = []

    def spoil(gradient):
        times.append(1)
        return gradient * math.nan if len(times) == 2 else gradient

    weight = same.student.model.layers[1].mlp.up_proj.weight
    before = []

    class Weights(TrainerCallback):
        def on_step_end(self, *args, **options):
            before.append(weight.detach().clone())

    weight.requires_grad_(True).register_hook(spoil)
    trainer, said, ended = trained(tmp_path, same, term, callbacks=[Weights()])
    assert ended is None and not not_finite(trainer.model)
    assert torch.equal(before[0], before[1]) and not torch.equal(before[1], before[2])
    logged = [line for line in lines(tmp_path) if "loss" in line]
    assert [line["step/skipped"] for line in logged] == [0, 1, 0]
    assert [math.isnan(line["loss"]) for line in logged] == [False, True, False]
    assert any("step 2: skipped, the gradient is not finite" in text for text in said)


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_a_broken_teacher_weight_stops_the_run_with_the_reason(term, same, tmp_path):
    with torch.no_grad():
        same.teacher.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
    before = copy.deepcopy(same.student.state_dict())
    trainer, said, ended = trained(tmp_path, same, term, max_steps=8, save_strategy="steps", save_steps=1)
    assert "max_skipped=3" in str(ended) and "16 of 16 responses are not finite" in str(ended)
    assert all(torch.equal(before[name], value) for name, value in trainer.model.state_dict().items())
    assert any("the teacher's states, layer 1" in text for text in said)


def test_a_share_above_the_limit_skips_the_step(same, tmp_path):
    same.student.model.layers[1].register_forward_hook(Spoiled(math.nan, only_with_gradients=True))
    trainer, said, ended = trained(tmp_path, same, Representation(positions="all"), max_nonfinite=0.05)
    assert ended is None and not not_finite(trainer.model)
    assert [line["step/skipped"] for line in lines(tmp_path) if "loss" in line] == [1, 0, 0]
    assert any(f"skipped, 1 of {RESPONSES} responses are not finite" in text for text in said)


def test_weights_that_are_not_finite_are_not_saved(same, tmp_path):
    class Overflow(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            with torch.no_grad():
                next(model.parameters()).view(-1)[0] = math.inf

    _, _, ended = trained(
        tmp_path,
        same,
        Representation(positions="all"),
        callbacks=[Overflow()],
        save_strategy="steps",
        save_steps=1,
    )
    assert "step 1" in str(ended) and "NaN or infinity" in str(ended)
    assert not list(tmp_path.glob("checkpoint-*"))


@pytest.mark.parametrize(
    "changes", [dict(max_nonfinite=1.5), dict(max_nonfinite=math.nan), dict(max_skipped=0)], ids=str
)
def test_limits_of_the_settings(changes, tmp_path):
    with pytest.raises(ValueError, match=next(iter(changes))):
        short_run(tmp_path, **changes)
