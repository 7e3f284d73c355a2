"""Targets beyond the teacher: RIDE is OPRD at strength 1, and its controls go elsewhere."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from short_runs import short_run

from oprd_nb.bridge.pca import Bridge
from oprd_nb.extrapolation import DIRECTIONS, Extrapolated
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.distances import DISTANCES
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.structure.moments import Moments
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer


@pytest.fixture
def models(same):
    rollouts = HFSampler(same.student, same.tokenizer).sample(same.task.test["prompt"][:6], max_new_tokens=24)
    teacher = Teacher(same.teacher, same.tokenizer)
    base = Teacher(embedded("same").student, same.tokenizer)
    return same, rollouts, teacher, base


def value_and_gradient(student, loss):
    student.zero_grad()
    loss.backward()
    return loss.item(), [p.grad.clone() for p in student.parameters() if p.grad is not None]


def test_strength_one_is_oprd_to_the_bit_and_does_not_read_the_base(models, monkeypatch):
    pair, rollouts, teacher, base = models
    monkeypatch.setattr(base, "capture", None)
    results = [
        value_and_gradient(
            pair.student, loss_of(Representation(), pair.student, asked, rollouts, pair.tokenizer)[0]
        )
        for asked in (teacher, Extrapolated(teacher, base, strength=1))
    ]
    (loss, gradients), (other, other_gradients) = results
    assert loss == other
    for mine, theirs in zip(gradients, other_gradients, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("strength", [0.5, 1.25, 2.0])
@pytest.mark.parametrize("distance", ["mse", "normalized_mse"])
def test_the_loss_is_the_scaled_distance_to_the_moved_states(models, strength, distance):
    pair, rollouts, teacher, base = models
    objective = Representation([2, 4], distance=distance)
    loss, _ = loss_of(
        objective, pair.student, Extrapolated(teacher, base, strength), rollouts, pair.tokenizer
    )
    pairs = teacher.read(rollouts, pair.tokenizer)
    rows = objective.mask(pairs).flatten().nonzero().squeeze(1)
    expected = 0.0
    for layer in (2, 4):
        student = Teacher(embedded("same").student, pair.tokenizer).capture(pairs, {layer: rows})[layer]
        h_teacher = teacher.capture(pairs, {layer: rows})[layer].double()
        h_base = base.capture(pairs, {layer: rows})[layer].double()
        target = h_teacher + (strength - 1) * (h_teacher - h_base)
        expected += DISTANCES[distance](student.double(), target).mean().item() / 2
    assert loss.item() == pytest.approx(expected / strength**2, rel=1e-4)


def test_terms_on_logits_are_not_scaled(models, monkeypatch):
    pair, rollouts, teacher, base = models
    asked = Extrapolated(teacher, base, strength=1.5)
    loss, _ = loss_of(FullKL(), pair.student, asked, rollouts, pair.tokenizer)
    monkeypatch.setattr(Extrapolated, "loss_scale", 1.0)
    unscaled, _ = loss_of(FullKL(), pair.student, asked, rollouts, pair.tokenizer)
    assert loss.item() == unscaled.item() > 0


def test_a_bridge_sees_the_moved_states(models):
    pair, rollouts, teacher, base = models
    pairs = teacher.read(rollouts, pair.tokenizer)
    rows = pairs.teacher_rows
    student = Teacher(embedded("same").student, pair.tokenizer)
    layers = [(layer, layer) for layer in (2, 4)]
    moments = Moments(layers, 96, 96)
    for layer, _ in layers:
        states = [model.capture(pairs, {layer: rows})[layer] for model in (student, teacher)]
        moments.update((layer, layer), *states)
    bridge = Bridge.fit(moments, rank=8, ridge=1e-3)
    asked = Extrapolated(teacher, base, strength=1.5)
    keep = {4: lambda hidden: bridge.project_teacher(4, hidden)}
    moved = asked.capture(pairs, {4: rows})[4]
    captured = asked.capture(pairs, {4: rows}, transforms=keep)
    assert captured.transformed == {4}
    assert torch.allclose(captured[4], bridge.project_teacher(4, moved), atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS[1:])
def test_controls_step_as_far_or_back_but_elsewhere(models, direction):
    pair, rollouts, teacher, base = models
    pairs = teacher.read(rollouts, pair.tokenizer)
    rows = {4: pairs.teacher_rows}
    here = teacher.capture(pairs, rows)[4]
    true_step = Extrapolated(teacher, base, 1.25).capture(pairs, rows)[4] - here
    asked = Extrapolated(teacher, base, 1.25, direction)
    step = asked.capture(pairs, rows)[4] - here
    assert torch.cosine_similarity(step, true_step).mean() < 0.6
    if direction != "shuffled":
        assert torch.allclose(step.norm(dim=-1), true_step.norm(dim=-1), rtol=1e-3)


@pytest.mark.parametrize("strength", [0, -1, float("nan"), float("inf")])
def test_a_strength_that_cannot_be_meant_is_refused(models, strength):
    _, _, teacher, base = models
    with pytest.raises(ValueError, match="strength=.*above 0"):
        Extrapolated(teacher, base, strength)


def test_a_base_of_another_shape_or_tokenizer_and_an_unknown_direction_are_refused(models):
    _, _, teacher, base = models
    wide = embedded("cross_architecture")
    foreign = embedded("cross_tokenizer")
    with pytest.raises(ValueError, match="base: 6 layers of width 128"):
        Extrapolated(teacher, Teacher(wide.teacher, wide.tokenizer))
    with pytest.raises(ValueError, match="base: it has another tokenizer"):
        Extrapolated(teacher, Teacher(foreign.teacher, foreign.teacher_tokenizer))
    with pytest.raises(ValueError, match="direction='up'"):
        Extrapolated(teacher, base, direction="up")


@pytest.mark.parametrize("own_base", [False, True])
def test_it_trains(models, tmp_path, own_base):
    pair, _, teacher, base = models
    student = pair.student
    if own_base:
        student = get_peft_model(student, LoraConfig(r=4, target_modules="all-linear"))
        base = Teacher.of_base(student, pair.tokenizer)
    trainer = OPRDTrainer(
        model=student,
        teacher=Extrapolated(teacher, base),
        objective=Representation(),
        args=short_run(tmp_path, max_steps=2, logging_steps=1),
        train_dataset=pair.task.train,
        processing_class=pair.tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(0 < loss < 10 for loss in losses)
