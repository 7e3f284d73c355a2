"""The task's reward as a term: against a float64 reference, over micro-batches, in runs, and refused."""

import json
import math
import warnings

import pytest
import torch
from short_runs import short_run
from test_objectives import PROMPTS, RESPONSES, BareTeacher, tiny_gpt2
from transformers import TrainerCallback

from oprd_nb.core import Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.followups import Weighted
from oprd_nb.objectives.objective import loss_of, loss_on_pairs, score_responses
from oprd_nb.objectives.output_space import CrossEntropy, FullKL, SampledTokenKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.reward import TaskReward, group_advantages, prompt_groups
from oprd_nb.objectives.terms import as_objective
from oprd_nb.pairing.positions import identity_pairs
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer


class Ids:
    """A tokenizer for tests: each token is its number."""

    def batch_decode(self, sequences, skip_special_tokens=True):
        return [" ".join(map(str, ids)) for ids in sequences]


def by_length(text, known):
    return len(text.split()) * known


@pytest.fixture(scope="module")
def models():
    return tiny_gpt2(0), tiny_gpt2(1).requires_grad_(False)


GROUPED_PROMPTS = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1], PROMPTS[2]]
GROUPED_RESPONSES = [*RESPONSES, [5, 6]]
KNOWN = [1.0, 2.0, 1.0, 2.0, 3.0]


def grouped(which=range(5)):
    return Rollouts.from_ids(
        [GROUPED_PROMPTS[i] for i in which], [GROUPED_RESPONSES[i] for i in which], pad_token_id=2
    )


def scored(term):
    rollouts = grouped()
    rollouts.columns = {"answer": KNOWN}
    return score_responses(as_objective(term), rollouts, Ids())


def reference_advantages(divide):
    rewards = [len(response) * known for response, known in zip(GROUPED_RESPONSES, KNOWN, strict=True)]
    found = []
    for i, reward in enumerate(rewards):
        own = [rewards[j] for j in range(5) if GROUPED_PROMPTS[j] == GROUPED_PROMPTS[i]]
        mean = sum(own) / len(own)
        scale = 1.0
        if divide and len(own) > 1:
            scale = math.sqrt(sum((value - mean) ** 2 for value in own) / (len(own) - 1))
        found.append((reward - mean) / scale)
    return found


def reference_loss(student, advantages, reduction):
    per_response = []
    for prompt, response, advantage in zip(GROUPED_PROMPTS, GROUPED_RESPONSES, advantages, strict=True):
        logits = student(input_ids=torch.tensor([prompt + response])).logits[0]
        losses = []
        for i, token in enumerate(response):
            row = logits[len(prompt) + i - 1]
            losses.append(-advantage * (row[token] - row.exp().sum().log()))
        per_response.append(torch.stack(losses))
    if reduction == "sequence":
        return torch.stack([losses.mean() for losses in per_response]).mean()
    return torch.cat(per_response).mean()


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("divide", [False, True])
def test_loss_and_gradient_are_those_of_the_formula(divide, reduction, models):
    student, teacher = models
    term = TaskReward(by_length, divide_by_std=divide)
    rollouts, _ = scored(term)
    objective = as_objective(term).with_reduction(reduction)
    pairs = identity_pairs(rollouts)
    found, metrics = loss_on_pairs(
        objective, student, BareTeacher(teacher, None), rollouts, pairs, objective.counts(pairs)
    )
    expected = reference_loss(student, reference_advantages(divide), reduction)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    weight = student.transformer.h[0].mlp.c_proj.weight
    torch.testing.assert_close(
        *(torch.autograd.grad(x, weight)[0] for x in (found, expected)), rtol=1e-5, atol=1e-9
    )
    assert list(metrics) == ["reward/pg_loss"]


def test_without_a_baseline_the_reward_itself_multiplies(models):
    student, teacher = models
    rollouts, _ = scored(TaskReward(by_length, baseline="none"))
    rewards = [len(response) * known for response, known in zip(GROUPED_RESPONSES, KNOWN, strict=True)]
    assert rollouts.columns["score/reward"] == rewards


def test_micro_batches_that_cut_groups_add_up(models):
    student, teacher = models
    term = TaskReward(by_length, divide_by_std=True) + 2 * FullKL()
    rollouts, _ = scored(term)
    pairs = identity_pairs(rollouts)
    counts = term.counts(pairs)
    weight = student.transformer.h[0].mlp.c_proj.weight

    def gradient(which):
        part = rollouts.select(which)
        loss, _ = loss_on_pairs(term, student, BareTeacher(teacher, None), part, identity_pairs(part), counts)
        return torch.autograd.grad(loss, weight)[0]

    # 0 and 2 answer one prompt, 1 and 3 another.
    torch.testing.assert_close(
        gradient(range(5)), gradient([0, 1]) + gradient([2, 3, 4]), rtol=1e-6, atol=1e-10
    )


def test_equal_rewards_have_no_advantage_whatever_rounding_does():
    rewards = torch.tensor([0.1] * 7 + [0.3, 0.2])
    for divide in (False, True):
        advantages, equal = group_advantages(rewards, torch.tensor([0] * 7 + [1, 1]), divide)
        assert advantages[:7].tolist() == [0] * 7 and equal.tolist() == [True, False]
        assert advantages[7:].sum().abs() < 1e-6 < advantages[7]
    lonely, equal = group_advantages(torch.tensor([4.0]), torch.tensor([0]), True)
    assert lonely.tolist() == [0] and equal.tolist() == [True]


def test_groups_are_found_by_prompts_wherever_they_are():
    assert prompt_groups(grouped()).tolist() == [0, 1, 0, 1, 2]


class Seen(TrainerCallback):
    def __init__(self):
        self.gradients, self.logs = [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **_):
        kept = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.gradients.append(kept)

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(logs)


@pytest.fixture(scope="module")
def stored():
    pair = embedded("same")
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.train["prompt"][:8], n=4, max_new_tokens=30
    )
    return Rollouts.from_ids(rollouts.prompt_ids(), rollouts.responses(), 0)


def odd(text, answer):
    return float(len(text) % 3)


def run(folder, objective, sampler=None, pair=None, dataset=None, teacher=None, **changes):
    pair = pair or embedded("same")
    seen = Seen()
    settings = dict(
        max_steps=1, per_device_train_batch_size=32, num_generations=4, max_grad_norm=0.0, optim="sgd"
    )
    trainer = OPRDTrainer(
        model=pair.student.requires_grad_(True),
        teacher=teacher or Teacher(pair.teacher, pair.teacher_tokenizer),
        objective=objective,
        args=short_run(folder, **(settings | changes)),
        train_dataset=pair.task.train.select(range(8)) if dataset is None else dataset,
        processing_class=pair.tokenizer,
        sampler=sampler,
        callbacks=[seen],
    )
    trainer.train()
    return trainer, seen


@pytest.mark.parametrize(
    "changes",
    [dict(per_device_train_batch_size=2, gradient_accumulation_steps=16), dict(token_budget=150)],
    ids=["accumulation", "token budget"],
)
@pytest.mark.parametrize(
    "objective",
    [TaskReward(odd), Representation() + 0.5 * TaskReward(odd, divide_by_std=True)],
    ids=["reward", "representation and reward"],
)
def test_cutting_a_step_changes_nothing(objective, changes, stored, tmp_path):
    """Micro-batches of two cut every group of four."""
    kept = []
    for number, options in enumerate(({}, changes)):
        pair = embedded("same")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            _, seen = run(
                tmp_path / str(number), objective, ReplaySampler(stored, pair.tokenizer), pair, **options
            )
        kept.append((seen.gradients[0], next(logs for logs in seen.logs if "loss" in logs)))
    (whole, first), (pieces, second) = kept
    assert whole.keys() == pieces.keys()
    assert max(g.abs().max() for g in whole.values()) > 1e-4
    for key, value in whole.items():
        torch.testing.assert_close(pieces[key], value, rtol=1e-4, atol=1e-6, msg=key)
    for name in ("reward/mean", "reward/equal_groups", "reward/pg_loss"):
        assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6)


def test_groups_that_are_all_alike_give_no_gradient_and_are_counted(stored, tmp_path):
    pair = embedded("same")
    _, seen = run(tmp_path, TaskReward(lambda text, answer: 0.1), ReplaySampler(stored, pair.tokenizer), pair)
    assert max(g.abs().max() for g in seen.gradients[0].values()) == 0
    logs = next(logs for logs in seen.logs if "loss" in logs)
    assert logs["reward/equal_groups"] == 1 and logs["reward/mean"] == pytest.approx(0.1)


def test_the_reward_is_graded_as_the_run_grades(stored, tmp_path):
    pair = embedded("same")
    for name in ("", "number"):
        trainer, seen = run(
            tmp_path / (name or "math"),
            TaskReward(),
            ReplaySampler(stored, pair.tokenizer),
            embedded("same"),
            grade_with=name,
        )
        logs = next(logs for logs in seen.logs if "loss" in logs)
        assert logs["reward/mean"] == logs["rollout/accuracy"]
    about = json.loads((tmp_path / "math" / "about.json").read_text())
    assert about["label"] == "task reward"


def test_a_reward_alone_never_asks_the_teacher(stored, tmp_path, monkeypatch):
    def capture(*args, **options):
        raise AssertionError("the teacher was asked")

    pair = embedded("cross_tokenizer")
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    monkeypatch.setattr(teacher, "capture", capture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _, seen = run(tmp_path, TaskReward(odd), ReplaySampler(stored, pair.tokenizer), pair, teacher=teacher)
        assert max(g.abs().max() for g in seen.gradients[0].values()) > 1e-4
        with pytest.raises(AssertionError, match="was asked"):
            run(
                tmp_path,
                TaskReward(odd) + Representation(positions="last:9", layers="2"),
                ReplaySampler(stored, pair.tokenizer),
                pair,
                teacher=teacher,
            )


def test_every_token_counts_where_tokenizers_differ(stored):
    pair = embedded("cross_tokenizer")
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer, min_coverage=0.0)
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(pair.task.train["prompt"][:4], max_new_tokens=9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        pairs = teacher.read(rollouts, pair.tokenizer)
    assert pairs.coverage < 1
    counts = as_objective(TaskReward() + CrossEntropy()).counts(pairs)
    assert counts.tolist() == [rollouts.response_mask.sum()] * 2


def test_a_gated_reward_keeps_its_scores(same):
    rollouts = HFSampler(same.student, same.tokenizer).sample(
        same.task.train["prompt"][:2], n=4, max_new_tokens=20
    )
    rollouts.columns = {"answer": ["1"] * 8}
    teacher = Teacher(same.teacher, same.teacher_tokenizer)
    plain, _ = loss_of(TaskReward(odd), same.student, teacher, rollouts, same.tokenizer)
    gated, _ = loss_of(
        Weighted(TaskReward(odd), by="student_entropy", at_least=0.0),
        same.student,
        teacher,
        rollouts,
        same.tokenizer,
    )
    assert torch.equal(plain, gated) and plain != 0


def test_two_rewards_need_two_names(same, tmp_path):
    with pytest.raises(ValueError, match="2 terms named 'reward' score responses"):
        run(tmp_path, TaskReward() + TaskReward(odd), pair=same)
    rollouts = HFSampler(same.student, same.tokenizer).sample(
        same.task.train["prompt"][:2], n=2, max_new_tokens=20
    )
    rollouts.columns = {"answer": ["1"] * 4}
    both = TaskReward() + TaskReward(odd, name="odd")
    _, metrics = loss_of(both, same.student, Teacher(same.teacher, same.tokenizer), rollouts, same.tokenizer)
    assert {"reward/mean", "odd/mean", "reward/pg_loss", "odd/pg_loss"} <= set(metrics)


@pytest.mark.parametrize(
    "objective, changes, message",
    [
        (TaskReward(), dict(num_generations=1), r"num_generations=1: .*TaskReward\(baseline='none'\)"),
        (SampledTokenKL() + TaskReward(column="tests"), {}, "train_dataset: has no column 'tests'"),
        (Weighted(TaskReward()), dict(num_generations=1), "num_generations=1"),
    ],
)
def test_what_cannot_be_rewarded_is_refused_before_anything_is_written(
    objective, changes, message, same, tmp_path
):
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path / "run", objective, pair=same, dataset=same.task.train.select(range(32)), **changes)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_prompts_without_an_answer_are_counted(same, tmp_path):
    rows = same.task.train.select(range(8))
    answers = [None, None, *rows["answer"][2:]]
    some = rows.remove_columns("answer").add_column("answer", answers)
    with pytest.raises(ValueError, match="'answer' is missing for 2 of 8 prompts"):
        run(tmp_path / "run", TaskReward(), pair=same, dataset=some)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: TaskReward(baseline="mean"), "baseline='mean': use 'group' or 'none'"),
        (lambda: TaskReward(baseline="none", divide_by_std=True), "divide_by_std=True"),
        (lambda: TaskReward("maths"), "grade_with='maths'"),
        (lambda: TaskReward(positions="end"), "positions='end'"),
        (
            lambda: scored(TaskReward(lambda text, known: math.nan)),
            "reward: is nan for the response '10 11 12 2'",
        ),
        (lambda: score_responses(as_objective(TaskReward()), grouped(), Ids()), "have no column 'answer'"),
    ],
)
def test_bad_settings_name_argument_value_and_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()
