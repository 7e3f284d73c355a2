"""A student that teaches itself: what it is told, whose weights it has, and runs that end as they began."""

import copy
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from short_runs import short_run

from oprd_nb.cli.request import TrainArguments, check_methods, other_prompt, own_weights
from oprd_nb.models import embedded
from oprd_nb.objectives.followups import Weighted
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL, TopKKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.privileged import PrivilegedTeacher, ToldPrompt
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.several import TeacherMix, Teachers
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer

TERMS = [Representation(positions="all"), FullKL(), TopKKL(4), SampledTokenKL()]
TOLD = ToldPrompt("{}={answer}")
SHARED = ["base", "self", "ema", "copy"]


def user(text: str) -> dict:
    return {"role": "user", "content": text}


@pytest.fixture
def own():
    """A pair of which the test may train the student."""
    return embedded("same")


@pytest.fixture
def with_adapters(own):
    torch.manual_seed(0)
    return get_peft_model(own.student, LoraConfig(r=4, target_modules="all-linear"))


@pytest.fixture
def rollouts(own):
    problems = own.task.train.select(range(12))
    written = HFSampler(own.student, own.tokenizer).sample(problems["prompt"], max_new_tokens=40, seed=3)
    written.columns = {"answer": problems["answer"]}
    return written


# What it is told


@pytest.mark.parametrize(
    "text, system, record, expected",
    [
        ("{} is {answer}", "{}", {"answer": "4"}, [user("2+2 is 4")]),
        ("{a}{} {b}", "{}", {"a": None, "b": 7}, [user("2+2 7")]),
        ("{}", "Hint: {a}", {"a": "add"}, [{"role": "system", "content": "Hint: add"}, user("2+2")]),
        ("{}\n{answer}\n{}", "{}", {"answer": "{}"}, [user("2+2\n{}\n2+2")]),
        ("\\frac{a}{b} \\boxed{x} {}", "{}", {}, [user("\\frac{a}{b} \\boxed{x} 2+2")]),
        ("Be careful. {}", "{}", {}, [user("Be careful. 2+2")]),
    ],
    ids=["column", "none and a number", "system", "braces in a column", "latex", "no column"],
)
def test_told(text, system, record, expected):
    told = ToldPrompt(text, system)
    assert set(told.columns) == set(record)
    assert told([user("2+2")], **record) == expected


def test_a_system_message_is_quoted_and_replaced():
    messages = [{"role": "system", "content": "Be brief."}, user("2+2")]
    told = ToldPrompt(system="{} The answer is {answer}.")(messages, answer="4")
    assert told == [{"role": "system", "content": "Be brief. The answer is 4."}, user("2+2")]


@pytest.mark.parametrize("empty", ["", "  ", None])
def test_a_record_with_nothing_to_tell_changes_nothing(empty):
    messages = [user("2+2")]
    assert ToldPrompt("The answer is {answer}. {}")(messages, answer=empty) is messages


def test_columns_travel_and_are_missed(own, rollouts):
    teacher = Teacher(own.teacher, own.tokenizer, prompt=TOLD)
    read = teacher.read(rollouts, own.tokenizer).teacher_inputs.prompt_ids()
    for ids, prompt, answer in zip(read, rollouts.prompts, rollouts.columns["answer"], strict=True):
        assert f"{prompt[0]['content']}={answer}" in own.tokenizer.decode(ids)
    with pytest.raises(ValueError, match="rollouts.columns: has no 'answer'"):
        teacher.read(replace(rollouts, columns=None), own.tokenizer)
    with pytest.raises(ValueError, match="train_dataset: has no column 'answer'"):
        teacher.check_columns(Dataset.from_dict({"prompt": [[user("1")]]}))


def test_each_of_several_teachers_is_told_its_own(own, rollouts):
    told, plain = (Teacher(own.teacher, own.tokenizer, prompt=prompt) for prompt in (TOLD, None))
    several = Teachers({"told": told, "plain": plain})
    assert several.columns == ("teacher", "answer")
    names = ["told", "plain"] * 6
    rollouts.columns = rollouts.columns | {"teacher": names}
    for ids, name, answer in zip(
        several.read(rollouts, own.tokenizer).teacher_inputs.prompt_ids(),
        names,
        rollouts.columns["answer"],
        strict=True,
    ):
        assert (f"={answer}<" in own.tokenizer.decode(ids)) == (name == "told")
    with pytest.raises(ValueError, match="prompts or templates differ"):
        TeacherMix({"told": told, "plain": plain})


def test_the_first_tokens_are_skipped(own, rollouts):
    """The states that predict them have no partner; all other pairs stay."""
    every, later = (
        Teacher(own.teacher, own.tokenizer, prompt=TOLD, skip=skip).read(rollouts, own.tokenizer)
        for skip in (0, 3)
    )
    response = rollouts.response_mask
    first = response.int().argmax(1)
    columns = torch.arange(response.shape[1])
    early = (columns >= first[:, None] - 1) & (columns < first[:, None] + 2)
    assert torch.equal(later.paired, every.paired & ~early)
    assert FullKL().mask(later).sum() == FullKL().mask(every).sum() - 3 * len(rollouts)
    with pytest.raises(ValueError, match="skip=-1"):
        Teacher(own.teacher, own.tokenizer, skip=-1)


# Whose weights it has


@pytest.mark.parametrize("weights", SHARED)
@pytest.mark.parametrize("term", TERMS, ids=lambda term: term.name)
def test_nothing_told_by_the_same_weights_is_nothing(own, with_adapters, rollouts, weights, term):
    """Exactly 0, and so is the gradient (LoRA begins as nothing, so the base is the student, too)."""
    teacher = PrivilegedTeacher(with_adapters, own.tokenizer, TOLD, weights)
    rollouts.columns = {"answer": [None] * len(rollouts)}
    loss, _ = loss_of(term, with_adapters, teacher, rollouts, own.tokenizer)
    loss.backward()
    assert loss.item() == 0
    if term.name != "sampled":
        gradients = [p.grad for p in with_adapters.parameters() if p.grad is not None]
        assert gradients and all(gradient.abs().max() < 1e-6 for gradient in gradients)
    rollouts.columns = {"answer": ["7"] * len(rollouts)}
    told, _ = loss_of(term, with_adapters, teacher, rollouts, own.tokenizer)
    assert told.abs().item() > 1e-3


@pytest.mark.parametrize("weights", ["self", "ema", "copy"])
def test_gradients_are_those_against_a_frozen_copy(own, rollouts, weights):
    """The student's head, which a live teacher shares, is not trained through the teacher's side."""
    frozen = Teacher(copy.deepcopy(own.student), own.tokenizer, prompt=TOLD)
    found = []
    for teacher in (frozen, PrivilegedTeacher(own.student, own.tokenizer, TOLD, weights)):
        objective = FullKL() + 0.5 * Representation(positions="all")
        loss, _ = loss_of(objective, own.student, teacher, rollouts, own.tokenizer)
        found.append(torch.autograd.grad(loss, list(own.student.parameters())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_the_student_goes_on_training_after_it_taught(with_adapters, own, rollouts):
    with_adapters.train()
    trained = [p.requires_grad for p in with_adapters.parameters()]
    for weights in SHARED:
        teacher = PrivilegedTeacher(with_adapters, own.tokenizer, TOLD, weights)
        pairs = teacher.read(rollouts, own.tokenizer)
        states = teacher.capture(pairs, {2: pairs.teacher_rows})[2]
        assert not states.requires_grad and with_adapters.training
    assert [p.requires_grad for p in with_adapters.parameters()] == trained


def test_a_copy_has_frozen_weights_in_common(with_adapters, own):
    teacher = PrivilegedTeacher(with_adapters, own.tokenizer, None, "copy")
    of_student = {id(p): p.requires_grad for p in with_adapters.parameters()}
    copied = [p for p in teacher.model.parameters() if id(p) not in of_student]
    assert sum(of_student.values()) == len(copied) == len(teacher.own_parameters())
    assert not any(of_student[id(p)] for p in teacher.model.parameters() if id(p) in of_student)
    with pytest.raises(ValueError, match="offload=True: 'a' has weights in common"):
        Teachers({"a": teacher}, offload=True)


@pytest.mark.parametrize("weights, options", [("ema", {"decay": 0.75}), ("copy", {"every": 3})])
def test_copies_follow_their_definition(own, weights, options):
    """After each step against the recursion in float64."""
    teacher = PrivilegedTeacher(own.student, own.tokenizer, None, weights, **options)
    weight = own.student.lm_head.weight
    expected = weight.detach().double()
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 8):
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
        teacher.after_step(step)
        if weights == "ema":
            expected = 0.75 * expected + 0.25 * weight.detach().double()
        elif step in (3, 6):
            expected = weight.detach().double()
        assert torch.allclose(teacher.model.lm_head.weight.double(), expected, atol=1e-6)
        assert not torch.equal(teacher.model.lm_head.weight, weight) or step in (3, 6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"weights": "mean"}, r"weights='mean': use one of \['base'"),
        ({"weights": "ema", "decay": 1.0}, "decay=1.0: must be at least 0 and below 1"),
        ({"weights": "copy", "every": 0}, "every=0: must be at least 1"),
    ],
)
def test_refused(own, arguments, message):
    with pytest.raises(ValueError, match=message):
        PrivilegedTeacher(own.student, own.tokenizer, **arguments)


def test_a_frozen_student_has_nothing_to_follow(own):
    with pytest.raises(ValueError, match="student: none of its weights is trained"):
        PrivilegedTeacher(own.student.requires_grad_(False), own.tokenizer, weights="ema")


def test_a_stored_teacher_of_another_student_is_refused(own, tmp_path):
    teacher = PrivilegedTeacher(own.student, own.tokenizer, weights="ema")
    with pytest.raises(ValueError, match="does not hold the weights"):
        teacher.load_weights(tmp_path / "missing.safetensors")
    wide = embedded("cross_architecture")
    PrivilegedTeacher(wide.teacher, wide.teacher_tokenizer, weights="ema").save_weights(tmp_path / "other")
    with pytest.raises(ValueError, match="does not hold the weights"):
        teacher.load_weights(tmp_path / "other")


# Runs


def trainer_of(own, weights, folder, objective=None, options=None, **changes):
    teacher = PrivilegedTeacher(own.student, own.tokenizer, TOLD, weights, **(options or {}))
    return OPRDTrainer(
        model=own.student,
        teacher=teacher,
        objective=objective or FullKL(),
        args=short_run(folder, **changes),
        train_dataset=own.task.train,
        processing_class=own.tokenizer,
    )


@pytest.mark.parametrize("weights", ["self", "ema", "copy"])
@pytest.mark.parametrize("objective", [FullKL(), Representation()], ids=["opd-full", "oprd"])
def test_a_run(own, weights, objective, tmp_path):
    """The teacher is where its definition says it is when three steps are over."""
    start = own.student.model.layers[0].mlp.up_proj.weight.detach().clone()
    trainer = trainer_of(own, weights, tmp_path, objective, {"decay": 0.9, "every": 2})
    trainer.train()
    trained = own.student.model.layers[0].mlp.up_proj.weight
    taught = trainer.teacher.model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(trained, start)
    assert (taught is trained) == (weights == "self")
    if weights == "ema":
        assert (taught - start).norm() < (trained - start).norm()
    if weights == "copy":
        assert not torch.equal(taught, trained) and not torch.equal(taught, start)
    assert all(step["loss"] > 0 for step in trainer.state.log_history if "loss" in step)


@pytest.mark.parametrize("weights", ["ema", "copy"])
def test_a_resumed_run_is_the_run_it_was(weights, tmp_path):
    """Four steps at once, and two and two: the same student, and the same teacher."""
    ends = []
    for name in ("whole", "halves"):
        settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "max_completion_length": 24}
        settings["lr_scheduler_type"] = "constant"
        options = {"decay": 0.5, "every": 3}
        if name == "halves":
            first = trainer_of(
                embedded("same"), weights, tmp_path / name, options=options, **settings | {"max_steps": 2}
            )
            first.train()
        trainer = trainer_of(embedded("same"), weights, tmp_path / name, options=options, **settings)
        trainer.train(resume_from_checkpoint=True if name == "halves" else None)
        stored = load_file(tmp_path / name / "checkpoint-4" / "teacher-0.safetensors")
        ends.append({**trainer.model.state_dict(), **stored})
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_sure_positions_are_dropped(own, rollouts):
    """Twin in float64: only positions whose largest student probability is at most 1 - threshold count."""
    teacher = PrivilegedTeacher(own.student, own.tokenizer, TOLD, "self")
    loss, metrics = loss_of(
        Weighted(FullKL(), "student_doubt", 0.2), own.student, teacher, rollouts, own.tokenizer
    )
    pairs = teacher.read(rollouts, own.tokenizer)
    mask = FullKL().mask(pairs)
    log_p = own.student(rollouts.input_ids, attention_mask=rollouts.attention_mask).logits
    log_p = log_p.double().log_softmax(-1)[mask]
    inputs = pairs.teacher_inputs
    read = own.student(inputs.input_ids, attention_mask=inputs.attention_mask).logits
    rows = pairs.teacher_rows_at(mask.flatten().nonzero().squeeze(1))
    log_q = read.flatten(0, 1)[rows].double().log_softmax(-1)
    each = (log_p.exp() * (log_p - log_q)).sum(-1)
    unsure = log_p.exp().amax(-1) <= 0.8
    assert 0 < unsure.sum() < len(unsure)
    assert loss.item() == pytest.approx((each * unsure).mean().item(), rel=1e-4)
    assert metrics["positions/weight"] == pytest.approx(unsure.double().mean().item(), abs=1e-6)


# The command line


@pytest.mark.parametrize(
    "text, expected",
    [
        ("base", {"weights": "base"}),
        ("self", {"weights": "self"}),
        ("ema:0.999", {"weights": "ema", "decay": 0.999}),
        ("copy:20", {"weights": "copy", "every": 20}),
        ("copy", {"weights": "copy"}),
        ("embedded/teacher", None),
        ("base:3", None),
    ],
)
def test_teachers_by_name(text, expected):
    assert own_weights(text) == expected


def test_requests_that_cannot_be(tmp_path):
    with pytest.raises(ValueError, match="teacher='ema:x': 'x' is no number"):
        own_weights("ema:x")
    base = TrainArguments("embedded/student", "base", "arithmetic")
    with pytest.raises(ValueError, match="train with --lora"):
        check_methods(base)
    check_methods(replace(base, teacher="self", min_doubt=0.1, skip=1))
    with pytest.raises(ValueError, match="names columns, which only training reads"):
        check_methods(replace(base, teacher="self", teacher_prompt="{answer} {}", method="bridge"))
    assert other_prompt(base) is None
