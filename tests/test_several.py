"""Several teachers: each row by its own, or the mean of all, in both spaces and in the trainer."""

import copy
from dataclasses import replace

import pytest
import torch
from short_runs import short_run

from oprd_nb.capture import FINAL
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.terms import Term
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.several import TeacherMix, Teachers
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer


def longer(messages):
    return [{"role": "user", "content": "11+22=33 " + messages[0]["content"]}]


def moved(model, seed):
    """A copy with other weights."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return other


@pytest.fixture
def models(same):
    names = ["math", "code", "code", "math", "code", "math"]
    rollouts = HFSampler(same.student, same.tokenizer).sample(same.task.test["prompt"][:6], max_new_tokens=24)
    teachers = {
        "code": Teacher(moved(same.teacher, 1), same.tokenizer),
        "math": Teacher(same.teacher, same.tokenizer),
    }
    return same, replace(rollouts, columns={"teacher": names}), teachers


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in student.parameters() if p.grad is not None]


def own_rollouts(rollouts, name):
    return rollouts.select([i for i, other in enumerate(rollouts.columns["teacher"]) if other == name])


@pytest.mark.parametrize("prompt", [None, longer], ids=["one prompt", "two prompts"])
def test_routing_equals_each_teacher_on_its_own_rows_to_the_bit_and_keeps_the_order(models, prompt):
    pair, rollouts, teachers = models
    teachers["code"].prompt = prompt
    routed = Teachers(teachers)
    pairs = routed.read(rollouts, pair.tokenizer)
    states = routed.capture(pairs, {2: pairs.teacher_rows, 4: pairs.teacher_rows})
    response = pairs.student_rows // rollouts.input_ids.shape[1]
    for name, teacher in teachers.items():
        alone = teacher.read(own_rollouts(rollouts, name), pair.tokenizer)
        expected = teacher.capture(alone, {2: alone.teacher_rows, 4: alone.teacher_rows})
        own = torch.tensor([rollouts.columns["teacher"][i] == name for i in response])
        for layer in (2, 4):
            assert torch.equal(states[layer][own], expected[layer])


@pytest.mark.parametrize("term", [Representation(), FullKL(), SampledTokenKL()], ids=lambda term: term.name)
def test_the_loss_is_the_sum_over_the_teachers_own_rows(models, term):
    pair, rollouts, teachers = models
    loss, metrics = loss_of(term, pair.student, Teachers(teachers), rollouts, pair.tokenizer)
    total = 0.0
    number = 0
    for name, teacher in teachers.items():
        own = own_rollouts(rollouts, name)
        count = int(own.response_mask.sum())
        alone, own_metrics = loss_of(term, pair.student, teacher, own, pair.tokenizer)
        total += alone.item() * count
        number += count
        for metric, value in own_metrics.items():
            if "_layer_" not in metric:
                assert metrics[f"{metric}/{name}"] == pytest.approx(value, abs=1e-5)
    assert loss.item() == pytest.approx(total / number, abs=1e-5)


def test_one_teacher_for_all_rows_is_that_teacher_to_the_bit(models):
    pair, rollouts, teachers = models
    rollouts = replace(rollouts, columns={"teacher": ["math"] * 6})
    for term in (Representation(), FullKL()):
        (routed, _), (alone, _) = (
            loss_of(term, pair.student, asked, rollouts, pair.tokenizer)
            for asked in (Teachers(teachers), teachers["math"])
        )
        results = [gradients(pair.student, loss) for loss in (routed, alone)]
        assert routed.item() == alone.item()
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("term", [Representation(), FullKL()], ids=lambda term: term.name)
def test_a_mix_of_weight_one_is_that_teacher_to_the_bit(models, term):
    pair, rollouts, teachers = models
    mix = TeacherMix(teachers, {"math": 1, "code": 0})
    losses = [
        loss_of(term, pair.student, asked, rollouts, pair.tokenizer)[0] for asked in (mix, teachers["math"])
    ]
    results = [gradients(pair.student, loss) for loss in losses]
    assert losses[0].item() == losses[1].item()
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("term", [Representation(distance="mse"), FullKL("forward")], ids=["rep", "full"])
def test_the_mixs_gradient_is_the_mean_of_the_gradients(models, term):
    """Exactly so where the gradient is linear in the target: squared distance, and forward KL."""
    pair, rollouts, teachers = models
    weights = {"code": 1, "math": 3}
    mixed = gradients(
        pair.student, loss_of(term, pair.student, TeacherMix(teachers, weights), rollouts, pair.tokenizer)[0]
    )
    each = {
        name: gradients(
            pair.student, loss_of(term, pair.student, teachers[name], rollouts, pair.tokenizer)[0]
        )
        for name in weights
    }
    for found, code, math in zip(mixed, each["code"], each["math"], strict=True):
        assert torch.allclose(found, 0.25 * code + 0.75 * math, atol=1e-6, rtol=1e-3)


def test_a_mix_at_a_temperature_is_the_mean_of_the_tempered_distributions(models):
    pair, rollouts, teachers = models
    mix = TeacherMix(teachers)
    pairs = mix.read(rollouts, pair.tokenizer)
    rows = {FINAL: pairs.teacher_rows}
    found = mix.head(2.0)(mix.capture(pairs, rows)[FINAL]).exp()
    naive = [(one.head()(one.capture(pairs, rows)[FINAL]) / 2).softmax(-1) for one in teachers.values()]
    assert torch.allclose(found, sum(naive) / 2, atol=1e-6)


class Final(Term):
    """A term that compares the final hidden states."""

    name = "final"

    def per_position(self, inputs):
        return (inputs.student[0] - inputs.teacher[0].take()).square().mean(-1), {}


def test_what_cannot_be_meant_is_refused_in_one_line(models):
    pair, rollouts, teachers = models
    routed = Teachers(teachers)
    wide = embedded("cross_architecture")
    with pytest.raises(ValueError, match="differ in depth, width"):
        Teachers(teachers | {"wide": Teacher(wide.teacher, wide.tokenizer)})
    with pytest.raises(ValueError, match="none given"):
        Teachers({})
    with pytest.raises(ValueError, match="no single model"):
        Teachers({"both": routed})
    with pytest.raises(ValueError, match="rollouts.columns: has no 'teacher'"):
        routed.read(replace(rollouts, columns=None), pair.tokenizer)
    with pytest.raises(ValueError, match="rollouts.columns: 'teacher' names 'art'"):
        routed.read(replace(rollouts, columns={"teacher": ["art"] * 6}), pair.tokenizer)
    with pytest.raises(ValueError, match="name the layer by its number"):
        loss_of(Final(), pair.student, routed, rollouts, pair.tokenizer)
    for weights in (
        {"math": 1},
        {"math": -1, "code": 2},
        {"math": 0, "code": 0},
        {"math": float("nan"), "code": 1},
    ):
        with pytest.raises(ValueError, match="weights"):
            TeacherMix(teachers, weights)
    teachers["code"].prompt = longer
    with pytest.raises(ValueError, match="prompts or templates differ"):
        TeacherMix(teachers)


def by_parity(problems):
    return problems.add_column("teacher", ["math" if i % 2 else "code" for i in range(len(problems))])


def trained(pair, teacher, dataset, folder, objective=None, **changes):
    student = embedded("same").student
    trainer = OPRDTrainer(
        model=student,
        teacher=teacher,
        objective=objective or Representation(),
        args=short_run(folder, max_steps=2, logging_steps=1, max_completion_length=24, **changes),
        train_dataset=dataset,
        processing_class=pair.tokenizer,
    )
    trainer.train()
    return student, [line for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("objective", [Representation(), FullKL() + Representation()], ids=["rep", "both"])
@pytest.mark.parametrize("options", [{}, {"token_budget": 120}], ids=["whole", "cut by length"])
def test_a_run_asks_the_teacher_that_the_column_names(models, tmp_path, objective, options):
    pair, _, teachers = models
    dataset = by_parity(pair.task.train.select(range(64)))
    _, lines = trained(pair, Teachers(teachers), dataset, tmp_path, objective, **options)
    for line in lines:
        values = [line[f"rep/cosine_similarity/{name}"] for name in teachers]
        assert min(values) <= line["rep/cosine_similarity"] <= max(values)
        assert values[1] > values[0], "the teacher with other weights is further from the student"
        assert {"rollout/accuracy/math", "rollout/accuracy/code"} <= line.keys()


def test_gradient_accumulation_changes_nothing(models, tmp_path):
    pair, _, teachers = models
    dataset = by_parity(pair.task.train.select(range(64)))
    results = []
    for number, (size, accumulated) in enumerate([(8, 1), (2, 4)]):
        changes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulated)
        _, lines = trained(pair, Teachers(teachers), dataset, tmp_path / str(number), **changes)
        results.append(lines[0])
    assert results[0]["grad_norm"] == pytest.approx(results[1]["grad_norm"], rel=1e-3)
    name = "rep/cosine_similarity/code"
    assert results[0][name] == pytest.approx(results[1][name], abs=1e-4)


def test_a_column_with_one_name_trains_as_that_teacher_to_the_bit(models, tmp_path):
    pair, _, teachers = models
    dataset = pair.task.train.select(range(64))
    dataset = dataset.add_column("teacher", ["math"] * 64)
    routed, _ = trained(pair, Teachers(teachers), dataset, tmp_path / "routed")
    alone, _ = trained(pair, teachers["math"], dataset, tmp_path / "alone")
    for mine, theirs in zip(routed.parameters(), alone.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_mix_trains(models, tmp_path):
    pair, _, teachers = models
    mix = TeacherMix(teachers, offload=True)
    _, lines = trained(pair, mix, pair.task.train.select(range(64)), tmp_path, FullKL() + Representation())
    assert len(lines) == 2


def test_a_set_that_names_no_teacher_is_refused_before_anything_runs(models, tmp_path):
    pair, _, teachers = models
    routed = Teachers(teachers, column="subject")
    with pytest.raises(ValueError, match="train_dataset: has no column 'subject'; add one that names"):
        trained(pair, routed, pair.task.train, tmp_path)
    wrong = pair.task.train.add_column("subject", ["art"] * len(pair.task.train))
    with pytest.raises(ValueError, match=r"'subject' names 'art'; the teachers are \['code', 'math'\]"):
        trained(pair, routed, wrong, tmp_path)
    assert not list(tmp_path.iterdir())
