"""Terms from work that followed: each against a naive twin in float64, in `loss_of`, and in a run."""

import math
import re
import shutil

import pytest
import torch
from short_runs import short_run

from oprd_nb.capture import FINAL
from oprd_nb.extrapolation import Extrapolated
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.distances import DISTANCES, Target
from oprd_nb.objectives.followups import (
    MEASURES,
    CrossFade,
    Farthest,
    Relational,
    TopKTailKL,
    Transitions,
    Weighted,
)
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.terms import TermInputs
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.several import Teachers
from oprd_nb.teachers import Teacher
from oprd_nb.training.reach import reached_parameters
from oprd_nb.training.trainer import OPRDTrainer

RESPONSES = torch.tensor([0, 0, 0, 0, 2, 2, 5])
N = len(RESPONSES)


def states(layers, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(layers, N, width, dtype=torch.float64, generator=generator))


def inputs_of(student, teacher, layer_pairs=None, **options):
    pairs = layer_pairs or [(layer, layer) for layer in range(1, len(student) + 1)]
    targets = [Target.of(hidden, shared=True) for hidden in teacher]
    return TermInputs(
        pairs, student, targets, torch.zeros(N, dtype=torch.long), responses=RESPONSES, **options
    )


@pytest.mark.parametrize("distance", DISTANCES)
def test_transitions_are_the_mean_distance_of_the_steps(distance):
    student, teacher = states(3), states(3, seed=1)
    losses, metrics = Transitions(distance=distance).per_position(inputs_of(student, teacher))
    for i in range(N):
        total = 0.0
        cosine = 0.0
        for low in (0, 1):
            a = student[low + 1][i] - student[low][i]
            b = teacher[low + 1][i] - teacher[low][i]
            total += DISTANCES[distance](a[None], b[None]).item() / 2
            cosine += (a @ b / a.norm() / b.norm()).item() / 2
        assert losses[i].item() == pytest.approx(total, rel=1e-12)
        assert metrics["transition/cosine_similarity"][i].item() == pytest.approx(cosine, rel=1e-12)


def test_the_gradient_of_transitions_is_autograds():
    student = [hidden.requires_grad_() for hidden in states(3)]
    teacher = states(3, seed=1)
    losses, _ = Transitions(distance="mse").per_position(inputs_of(student, teacher))
    found = torch.autograd.grad(losses.sum(), student)
    naive = sum(
        ((student[k + 1] - student[k]) - (teacher[k + 1] - teacher[k])).square().mean(-1).sum() / 2
        for k in (0, 1)
    )
    for mine, theirs in zip(found, torch.autograd.grad(naive, student), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-12)


def related(hidden, i, j, relation):
    if relation == "cosine":
        return (hidden[i] @ hidden[j] / hidden[i].norm() / hidden[j].norm()).item()
    return (hidden[i] - hidden[j]).norm().item()


@pytest.mark.parametrize("window", [1, 2, 9])
@pytest.mark.parametrize("relation", ["cosine", "distance"])
def test_relations_stay_inside_the_window_and_the_response(relation, window):
    student, teacher = states(2, width=5), states(2, width=8, seed=1)
    term = Relational(layers="all", window=window, relation=relation)
    losses, _ = term.per_position(inputs_of(student, teacher))
    for i in range(N):
        before = [j for j in range(max(0, i - window), i) if RESPONSES[j] == RESPONSES[i]]
        expected = 0.0
        for own, theirs in zip(student, teacher, strict=True):
            values = [[related(hidden, i, j, relation) for j in before] for hidden in (own, theirs)]
            if relation == "distance" and before:
                values = [[value / (sum(side) / len(side)) for value in side] for side in values]
            squares = [(a - b) ** 2 for a, b in zip(*values, strict=True)]
            expected += sum(squares) / max(len(squares), 1) / 2
        assert losses[i].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_equal_neighbours_have_finite_gradients():
    same = torch.ones(N, 4, dtype=torch.float64, requires_grad=True)
    losses, _ = Relational(relation="distance").per_position(inputs_of([same], states(1)))
    (gradient,) = torch.autograd.grad(losses.sum(), same)
    assert gradient.isfinite().all()


HEADS = dict(
    student_head=lambda hidden: hidden @ torch.arange(60.0, dtype=torch.float64).sin().view(6, 10),
    teacher_head=lambda hidden: hidden @ torch.arange(60.0, dtype=torch.float64).cos().view(6, 10),
)


def naive_measure(by, p, q):
    if by == "student_entropy":
        return -sum(x * math.log(x) for x in p) / math.log(len(p))
    if by == "teacher_entropy":
        return -sum(x * math.log(x) for x in q) / math.log(len(q))
    if by == "teacher_confidence":
        return max(q)
    if by == "student_doubt":
        return 1 - max(p)
    return sum(abs(x - y) for x, y in zip(p, q, strict=True)) / 2


@pytest.mark.parametrize("at_least", [None, 0.5])
@pytest.mark.parametrize("by", MEASURES)
@pytest.mark.parametrize("inner", [Representation(distance="mse"), FullKL()], ids=["rep", "full"])
def test_weights_multiply_the_inner_losses(inner, by, at_least):
    layers = [(1, 1), (2, 2)] if isinstance(inner, Representation) else []
    student, teacher = states(len(layers) + 1), states(len(layers) + 1, seed=1)
    term = Weighted(inner, by, at_least)
    losses, metrics = term.per_position(inputs_of(student, teacher, [*layers, (FINAL, FINAL)], **HEADS))
    if layers:
        plain = inputs_of(student[:2], teacher[:2], layers)
    else:
        plain = inputs_of(student, teacher, [(FINAL, FINAL)], **HEADS)
    unweighted, _ = inner.per_position(plain)
    for i in range(N):
        p = HEADS["student_head"](student[-1][i]).softmax(-1).tolist()
        q = HEADS["teacher_head"](teacher[-1][i]).softmax(-1).tolist()
        weight = naive_measure(by, p, q)
        if at_least is not None:
            weight = float(weight >= at_least)
        assert metrics["positions/weight"][i].item() == pytest.approx(weight, rel=1e-9)
        assert losses[i].item() == pytest.approx(weight * unweighted[i].item(), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("support", ["teacher", "student"])
@pytest.mark.parametrize("divergence", ["reverse", "forward"])
@pytest.mark.parametrize("k", [1, 4, 30])
def test_top_k_with_the_rest_is_the_divergence_of_the_coarse_distributions(support, divergence, k):
    z_student, z_teacher = torch.randn(
        2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    z_student.requires_grad_()
    found = TopKTailKL(k, support, divergence).of_logits(
        z_student, z_teacher, torch.zeros(5, dtype=torch.long)
    )
    for i in range(5):
        p, q = z_student[i].softmax(-1).tolist(), z_teacher[i].softmax(-1).tolist()
        chooser = q if support == "teacher" else p
        top = sorted(range(12), key=lambda token: -chooser[token])[: min(k, 11)]
        coarse = []
        for values in (p, q):
            kept = [values[token] for token in top]
            coarse.append([*kept, sum(values) - sum(kept)])
        if divergence == "forward":
            coarse.reverse()
        expected = sum(a * math.log(a / b) for a, b in zip(*coarse, strict=True))
        assert found[i].item() == pytest.approx(expected, rel=1e-9)
    (gradient,) = torch.autograd.grad(found.sum(), z_student)
    assert gradient.isfinite().all()


TERMS = {
    "steps": Transitions(),
    "relations": Relational(),
    "distances": Relational(relation="distance", layers="all"),
    "weighted": Weighted(Representation([2, 3]), "disagreement"),
    "gated": Weighted(FullKL(), "student_entropy", at_least=0.2),
    "tail": TopKTailKL(4),
}


@pytest.fixture
def models(same):
    rollouts = HFSampler(same.student, same.tokenizer).sample(same.task.test["prompt"][:6], max_new_tokens=24)
    return same, rollouts, Teacher(same.teacher, same.tokenizer)


@pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)
def test_parts_of_a_batch_add_up_and_a_model_is_at_no_distance_from_itself(models, term):
    pair, rollouts, teacher = models
    counts = torch.tensor([float(rollouts.response_mask.sum())])
    asked = (pair.student, teacher)
    whole, _ = loss_of(term, *asked, rollouts, pair.tokenizer, counts)
    parts = [
        loss_of(term, *asked, rollouts.select(part), pair.tokenizer, counts)[0]
        for part in ([0, 1], [2, 3, 4, 5])
    ]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts), rel=1e-4)
    assert whole.item() > 1e-4
    itself, _ = loss_of(
        term, pair.student, Teacher(embedded("same").student, pair.tokenizer), rollouts, pair.tokenizer
    )
    assert abs(itself.item()) < 1e-5


@pytest.mark.parametrize("inner", [Representation([2]), FullKL()], ids=["rep", "full"])
def test_weighting_trains_the_same_parameters(same, inner):
    plain = reached_parameters(same.student, inner.as_objective())
    assert reached_parameters(same.student, Weighted(inner).as_objective()) == plain


def test_weighting_keeps_the_scale_of_an_extrapolated_teacher(models):
    pair, rollouts, teacher = models
    beyond = Extrapolated(teacher, Teacher(embedded("same").student, pair.tokenizer), strength=2.0)
    everything = Weighted(Representation([2]), "teacher_confidence", at_least=0.0)
    losses = [
        loss_of(term, pair.student, beyond, rollouts, pair.tokenizer)[0].item()
        for term in (everything, Representation([2]))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_cannot_be_meant_is_refused(models):
    pair, rollouts, teacher = models
    for make, message in [
        (lambda: Weighted(FullKL(), "mood"), "by='mood'"),
        (lambda: Weighted(FullKL(), at_least=2.0), "at_least=2.0"),
        (lambda: Relational(relation="angle"), "relation='angle'"),
        (lambda: Relational(window=0), "window=0"),
        (lambda: Transitions(distance="far"), "distance='far'"),
        (lambda: TopKTailKL(0), "k=0"),
        (lambda: TopKTailKL(support="both"), "support='both'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
    with pytest.raises(ValueError, match="a step is between two layers"):
        loss_of(Transitions("last"), pair.student, teacher, rollouts, pair.tokenizer)


def trained(pair, teacher, objective, folder, dataset=None):
    trainer = OPRDTrainer(
        model=pair.student,
        teacher=teacher,
        objective=objective,
        args=short_run(folder, max_steps=2, logging_steps=1, max_completion_length=24),
        train_dataset=dataset or pair.task.train.select(range(64)),
        processing_class=pair.tokenizer,
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


def test_relations_train_a_student_of_another_width_without_a_bridge(tmp_path):
    pair = embedded("cross_architecture")
    lines = trained(pair, Teacher(pair.teacher, pair.teacher_tokenizer), Relational(), tmp_path)
    assert all(line["relation/error"] > 0 for line in lines)


def test_a_weighted_term_trains_with_two_teachers(models, tmp_path):
    pair, _, teacher = models
    routed = Teachers({"one": teacher, "two": Teacher(embedded("same").teacher, pair.tokenizer)})
    dataset = pair.task.train.select(range(64)).add_column("teacher", ["one", "two"] * 32)
    lines = trained(pair, routed, Weighted(Representation()) + TopKTailKL(4), tmp_path, dataset)
    assert all(0 < line["positions/weight/one"] < 1 for line in lines)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: CrossFade.of(FullKL() + Representation(), FullKL()), "between two terms, not 3"),
        (lambda: CrossFade.of(FullKL(), TopKTailKL(), begin=0.5), "begin=0.5, end=0.5: must be"),
        (lambda: CrossFade.of(FullKL(), TopKTailKL(), end=1.5), "end=1.5: must be"),
        (lambda: CrossFade.of(FullKL(), TopKTailKL()) + Representation(), "sets its own weights"),
        (lambda: Representation() + CrossFade.of(FullKL(), TopKTailKL()), "sets its own weights"),
        (lambda: CrossFade.of(FullKL(), 3), "use a term such as"),
    ],
)
def test_a_cross_fade_that_cannot_be_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_a_cross_fade_goes_from_one_term_to_the_other_in_a_run(tmp_path):
    """In each step the gradient is that of the weights of this step, and a resumed run goes on with them."""
    first, second = Representation("last"), FullKL()
    fade = 2 * CrossFade.of(first, 3 * second, begin=0.25, end=0.75)

    def run(folder, objective, resume=None):
        pair = embedded("same")
        trainer = OPRDTrainer(
            model=pair.student,
            teacher=Teacher(pair.teacher, pair.teacher_tokenizer),
            objective=objective,
            args=short_run(folder, max_steps=4, save_strategy="steps", save_steps=2, gradient_every=0),
            train_dataset=pair.task.train.select(range(64)),
            processing_class=pair.tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        lines = [line for line in trainer.state.log_history if "loss" in line]
        return lines, {name: weight.clone() for name, weight in trainer.model.named_parameters()}

    lines, weights = run(tmp_path / "fade", fade)
    for line, (one, other) in zip(lines, ((2, 0), (2, 0), (1, 3), (0, 6)), strict=True):
        expected = one * (2 - 2 * line["rep/cosine_similarity"]) + other * line["full/reverse"]
        assert line["loss"] == pytest.approx(expected, rel=1e-4)
    shutil.rmtree(tmp_path / "fade" / "checkpoint-4")
    _, again = run(tmp_path / "fade", fade, resume=True)
    assert all(again[name].equal(weight) for name, weight in weights.items())


@pytest.mark.parametrize("power", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("positions_too", [False, True])
@pytest.mark.parametrize("distance", ["mse", "normalized_mse"])
def test_the_farthest_layers_weigh_more_and_the_weights_have_no_gradient(power, positions_too, distance):
    student, teacher = states(3), states(3, seed=1)
    own = [hidden.clone().requires_grad_() for hidden in student]
    term = Farthest(distance=distance, power=power, positions_too=positions_too)
    losses, _ = term.per_position(inputs_of(own, teacher))
    twin = [hidden.clone().requires_grad_() for hidden in student]
    expected = []
    for i in range(N):
        apart = [DISTANCES[distance](a[i][None], b[i][None])[0] for a, b in zip(twin, teacher, strict=True)]
        weights = [one.item() ** power for one in apart]
        loss = sum(w * one for w, one in zip(weights, apart, strict=True)) / sum(weights)
        mean = sum(one.item() for one in apart) / len(apart)
        expected.append(loss * min(1, mean) if positions_too else loss)
    assert losses.tolist() == pytest.approx([one.item() for one in expected], rel=1e-10)
    losses.sum().backward()
    torch.stack(expected).sum().backward()
    for mine, other in zip(own, twin, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_the_farthest_of_states_that_agree_is_zero_and_a_wrong_power_is_refused():
    student = [hidden.requires_grad_() for hidden in states(3)]
    losses, _ = Farthest(distance="mse").per_position(inputs_of(student, states(3)))
    losses.sum().backward()
    assert losses.abs().max() == 0 and all(hidden.grad.abs().max() == 0 for hidden in student)
    with pytest.raises(ValueError, match="power=-1: must be between 0 and 10"):
        Farthest(power=-1)
