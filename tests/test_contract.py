"""The public contract: every line imports, has these names and defaults, and does what it says."""

import inspect
import math
import typing

import pandas as pd
import pytest
import torch
from trl import DistillationConfig

from oprd_nb.bridge import Bridge, ReadoutBridge
from oprd_nb.capture import capture
from oprd_nb.core import Layers, Positions, Rollouts, set_seed
from oprd_nb.evaluation import evaluate
from oprd_nb.models import embedded, load_model, load_tokenizer
from oprd_nb.objectives import FullKL, Representation, SampledTokenKL, TopKKL
from oprd_nb.pairing import Pairs, pair_layers, pair_positions
from oprd_nb.rollouts import HFSampler, MixedSampler, ReplaySampler, Sampler, VLLMSampler
from oprd_nb.structure import Moments, rank_curve, suggest_rank
from oprd_nb.tasks import grade, load_task
from oprd_nb.teachers import Teacher
from oprd_nb.training import OPRDConfig, OPRDTrainer

REQUIRED = inspect.Parameter.empty
PROMPTS = [[{"role": "user", "content": "12+34+56="}], [{"role": "user", "content": "7+80+9="}]]


def arguments_of(function) -> dict[str, object]:
    """Names and defaults of all arguments but `self`."""
    parameters = inspect.signature(function).parameters
    return {name: parameter.default for name, parameter in parameters.items() if name != "self"}


def begins_with(function, **expected) -> None:
    """The first arguments are these, in this order; any that follow have defaults."""
    found = arguments_of(function)
    assert dict(list(found.items())[: len(expected)]) == expected
    assert list(found)[: len(expected)] == list(expected)
    kinds = inspect.signature(function).parameters
    rest = [name for name in list(found)[len(expected) :] if "VAR" not in kinds[name].kind.name]
    assert all(found[name] is not REQUIRED for name in rest), rest


def accepts(function, **expected) -> None:
    """These arguments can be given by name and have these defaults, whatever their order."""
    found = arguments_of(function)
    assert {name: found.get(name, "no such argument") for name in expected} == expected


@pytest.fixture(scope="module")
def pair():
    return embedded("same")


@pytest.fixture(scope="module")
def rollouts(pair):
    return HFSampler(pair.student, pair.tokenizer).sample(PROMPTS, n=2, max_new_tokens=24, seed=0)


# core


def test_layers():
    begins_with(Layers, spec="all")
    assert arguments_of(Layers.of) == {"num_layers": REQUIRED}
    chosen = {"all": [1, 2, 3, 4, 5, 6], "last": [6], "even": [2, 4, 6], "odd": [1, 3, 5], "1,5": [1, 5]}
    assert {spec: Layers(spec).of(6) for spec in chosen} == chosen
    assert Layers("1,5,28").of(28) == Layers([1, 5, 28]).of(28) == [1, 5, 28]
    with pytest.raises(ValueError, match="28"):
        Layers([1, 5, 28]).of(27)


def test_positions():
    begins_with(Positions, spec="all", predicting=False)
    assert arguments_of(Positions.mask) == {"response_mask": REQUIRED}
    response = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0, 0]]).bool()

    def columns(spec, **options):
        mask = Positions(spec, **options).mask(response)
        assert mask.dtype == torch.bool and mask.shape == response.shape
        return [row.nonzero().flatten().tolist() for row in mask]

    assert columns("all") == columns("last:2000") == columns("first:50") == [[2, 3, 4, 5, 6], [1, 2, 3]]
    assert columns("last") == [[6], [3]]
    assert columns("last:2") == [[5, 6], [2, 3]]
    assert columns("last:30%") == [[5, 6], [3]]
    assert columns("first:1") == [[2], [1]]
    assert columns("first:1", predicting=True) == [[1], [0]]


def test_rollouts_carry_the_log_probabilities_of_the_sampler():
    fields = {"input_ids": REQUIRED, "attention_mask": REQUIRED, "response_mask": REQUIRED}
    begins_with(Rollouts, **fields, prompts=None, log_probs=None)
    ids = torch.tensor([[5, 6, 7], [0, 8, 9]])
    attention = torch.tensor([[1, 1, 1], [0, 1, 1]]).bool()
    response = torch.tensor([[0, 1, 1], [0, 0, 1]]).bool()
    log_probs = torch.tensor([[0.0, -0.5, -1.0], [0.0, 0.0, -2.0]])
    batch = Rollouts(ids, attention, response, prompts=None, log_probs=log_probs)
    torch.testing.assert_close(batch.log_probs, log_probs, rtol=0, atol=0)
    torch.testing.assert_close(batch.to("cpu").log_probs, log_probs, rtol=0, atol=0)
    assert Rollouts(ids, attention, response).log_probs is None
    with pytest.raises(ValueError, match="log_probs"):
        Rollouts(ids, attention, response, log_probs=log_probs[:, :2])


def test_set_seed():
    assert arguments_of(set_seed) == {"seed": REQUIRED}
    set_seed(3)
    first = torch.rand(4)
    set_seed(3)
    assert torch.equal(first, torch.rand(4))


# models and tasks


def test_load_model_and_tokenizer(pair):
    begins_with(load_model, path=REQUIRED, lora=None, quantize=None, dtype="auto", device="auto", train=False)
    assert list(arguments_of(load_tokenizer))[0] == "path"
    assert load_tokenizer("embedded/student").padding_side == "left"
    with pytest.raises(ValueError, match="quantize"):
        load_model("embedded/student", quantize="nf5")


@pytest.mark.parametrize("name", ["same", "cross_architecture", "cross_tokenizer"])
def test_embedded_pairs(name):
    assert list(arguments_of(embedded)) == ["name"]
    made = embedded(name)
    student_width = made.student.config.hidden_size
    teacher_width = made.teacher.config.hidden_size
    assert (student_width == teacher_width) == (name != "cross_architecture")
    same_words = made.tokenizer.get_vocab() == made.teacher_tokenizer.get_vocab()
    assert same_words == (name != "cross_tokenizer")
    assert {"prompt", "answer"} <= set(made.task.test.column_names)


def test_load_task(tmp_path):
    task = load_task("arithmetic")
    for split in (task.train, task.test):
        assert {"prompt", "answer"} <= set(split.column_names)
        assert split[0]["prompt"][-1]["role"] == "user"
        assert isinstance(split[0]["answer"], str)
    problems = [{"prompt": PROMPTS[0], "answer": "102"}, {"prompt": PROMPTS[1], "answer": "96"}]
    path = tmp_path / "problems.parquet"
    pd.DataFrame(problems).to_parquet(path)
    own = load_task(path)
    assert own.train is None
    assert own.test["answer"] == ["102", "96"]


def test_grade():
    assert arguments_of(grade) == {"response": REQUIRED, "answer": REQUIRED}
    assert grade(r"so it is \boxed{102}", "102") is True
    assert grade(r"\boxed{\frac{1}{2}}", "0.5") is True
    assert grade(r"\boxed{103}", "102") is False
    assert grade("102 without a box", "102") is False
    assert grade("", "") is False


# rollouts


def test_sampler_is_a_protocol_that_names_all_that_is_asked():
    assert typing.is_protocol(Sampler) if hasattr(typing, "is_protocol") else Sampler._is_protocol
    members = {name for name in {*vars(Sampler), *Sampler.__annotations__} if not name.startswith("_")}
    assert {"tokenizer", "eos_token_ids", "sample", "sync"} <= members
    accepts(Sampler.sample, prompts=REQUIRED, n=1, temperature=1.0, max_new_tokens=1024, seed=0)
    accepts(Sampler.sample, top_p=1.0, top_k=0, min_p=0.0, repetition_penalty=1.0, stop=())
    assert list(arguments_of(Sampler.sync)) == ["student"]


@pytest.mark.parametrize("kind", [HFSampler, MixedSampler, ReplaySampler, VLLMSampler])
def test_samplers_keep_to_the_protocol(kind):
    assert arguments_of(kind.sample) == arguments_of(Sampler.sample)
    assert arguments_of(kind.sync) == arguments_of(Sampler.sync)


def test_a_sampler_has_every_member_of_the_protocol(pair):
    sampler = HFSampler(pair.student, pair.tokenizer)
    members = {name for name in {*vars(Sampler), *Sampler.__annotations__} if not name.startswith("_")}
    assert [name for name in sorted(members) if not hasattr(sampler, name)] == []


def test_hf_sampler_writes_rollouts(pair, rollouts):
    assert isinstance(rollouts, Rollouts)
    assert len(rollouts) == 4
    assert [messages[0]["content"] for messages in rollouts.prompts] == ["12+34+56="] * 2 + ["7+80+9="] * 2
    shapes = {tuple(t.shape) for t in (rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask)}
    assert len(shapes) == 1
    sampler = HFSampler(pair.teacher, pair.tokenizer)
    sampler.sync(pair.student)
    again = sampler.sample(PROMPTS, n=2, temperature=1.0, max_new_tokens=24, seed=0)
    assert torch.equal(again.input_ids, rollouts.input_ids)


# capture and pairing


def test_capture(pair, rollouts):
    begins_with(
        capture,
        model=REQUIRED,
        input_ids=REQUIRED,
        attention_mask=REQUIRED,
        rows=REQUIRED,
        layers=REQUIRED,
        final_norm=True,
    )
    rows = rollouts.response_mask
    with torch.no_grad():
        captured = capture(pair.student, rollouts.input_ids, rollouts.attention_mask, rows, layers=[1, 2])
    assert {layer: tuple(captured[layer].shape) for layer in (1, 2)} == {
        layer: (int(rows.sum()), pair.student.config.hidden_size) for layer in (1, 2)
    }


def test_pair_layers_follows_equation_11():
    begins_with(pair_layers, num_student_layers=REQUIRED, num_teacher_layers=REQUIRED, how="proportional")
    pairs = pair_layers(28, 36)
    assert pairs[:2] == [(1, 1), (2, 2)]
    assert pairs[-1] == (28, 36)
    assert pairs == [(s + 1, math.floor(s * 35 / 27 + 0.5) + 1) for s in range(28)]
    similarity = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert pair_layers(2, 3, how="similarity", similarity=similarity) == [(1, 1), (2, 3)]


def test_pair_positions_of_one_tokenizer(pair, rollouts):
    arguments = {"rollouts": REQUIRED, "student_tokenizer": REQUIRED, "teacher_tokenizer": REQUIRED}
    begins_with(pair_positions, **arguments, min_coverage=0.5)
    pairs = pair_positions(rollouts, pair.tokenizer, pair.teacher_tokenizer, min_coverage=0.5)
    assert isinstance(pairs, Pairs)
    assert torch.equal(pairs.teacher_inputs.input_ids, rollouts.input_ids)
    assert torch.equal(pairs.student_rows, pairs.teacher_rows)
    assert pairs.coverage == pairs.boundary_coverage == 1.0
    assert not pairs.offset.any()
    # The last prompt position predicts the first response token, so it is paired too.
    assert len(pairs.student_rows) == int(rollouts.response_mask.sum()) + len(rollouts)


@pytest.mark.filterwarnings("ignore:only .* of the student's tokens")
def test_pair_positions_of_two_tokenizers():
    cross = embedded("cross_tokenizer")
    rollouts = HFSampler(cross.student, cross.tokenizer).sample(PROMPTS, n=2, max_new_tokens=24, seed=0)
    pairs = pair_positions(rollouts, cross.tokenizer, cross.teacher_tokenizer, min_coverage=0.0)
    assert len(pairs.student_rows) == len(pairs.teacher_rows) == len(pairs.offset)
    assert 0 < pairs.boundary_coverage <= pairs.coverage <= 1
    assert pairs.offset.min() == 0 < pairs.offset.max()
    assert not torch.equal(pairs.student_rows, pairs.teacher_rows)


# teachers, structure, bridge


def test_teacher(pair):
    begins_with(Teacher, model=REQUIRED, tokenizer=REQUIRED)
    accepts(Teacher, min_coverage=0.5, prompt=None)
    assert list(arguments_of(Teacher.of_base))[:2] == ["student", "tokenizer"]
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer, min_coverage=0.5, prompt=None)
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


@pytest.fixture
def planted():
    """Moments of a teacher that the student predicts well, and held-out hidden states."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(400, 6, generator=generator)
    mixed = student @ torch.randn(6, 5, generator=generator)
    teacher = mixed + 0.1 * torch.randn(400, 5, generator=generator)
    moments = Moments([(1, 2)], 6, 5)
    moments.update((1, 2), student[:300], teacher[:300])
    return moments, {(1, 2): (student[300:], teacher[300:])}, (student, teacher)


def test_moments_are_streamed_merged_and_in_float64(planted):
    begins_with(Moments, layer_pairs=REQUIRED, d_student=REQUIRED, d_teacher=REQUIRED)
    names = {"layer_pair": REQUIRED, "h_student": REQUIRED, "h_teacher": REQUIRED}
    assert arguments_of(Moments.update) == names
    whole, _, (student, teacher) = planted
    left, right = Moments([(1, 2)], 6, 5), Moments([(1, 2)], 6, 5)
    left.update((1, 2), student[:120], teacher[:120])
    right.update((1, 2), h_student=student[120:300], h_teacher=teacher[120:300])
    merged = left.merge(right)[1, 2]
    assert merged.count == 300
    expected = torch.cov(torch.cat([student, teacher], 1)[:300].T.double()) * 299
    for stats in (merged, whole[1, 2]):
        assert stats.scatter_cross.dtype == torch.float64
        torch.testing.assert_close(stats.scatter_cross, expected[:6, 6:])


def test_rank_curve_and_suggested_rank(planted):
    moments, heldout, _ = planted
    begins_with(rank_curve, moments=REQUIRED, heldout=REQUIRED, ranks=REQUIRED)
    curve = rank_curve(moments, heldout=heldout, ranks=[1, 2, 4])
    assert list(curve.columns)[:5] == ["layer", "rank", "cosine", "r2", "explained_variance"]
    assert list(curve["rank"]) == [1, 2, 4]
    assert set(curve["layer"]) == {1}
    assert curve["r2"].min() > 0.9
    assert list(arguments_of(suggest_rank))[0] == "moments"
    assert suggest_rank(moments, heldout).rank >= 4


def test_bridge_is_fitted_saved_loaded_and_checked(tmp_path, pair):
    wide = embedded("cross_architecture")
    widths = [model.config.hidden_size for model in (wide.student, wide.teacher)]
    depths = [model.config.num_hidden_layers for model in (wide.student, wide.teacher)]
    layer_pairs = pair_layers(*depths)
    moments = Moments(layer_pairs, *widths)
    generator = torch.Generator().manual_seed(0)
    for layer_pair in layer_pairs:
        states = [torch.randn(64, width, generator=generator) for width in widths]
        moments.update(layer_pair, *states)
    begins_with(Bridge.fit, moments=REQUIRED, rank=8, ridge=None)
    bridge = Bridge.fit(moments, rank=8, ridge=1e-3)
    bridge.save(tmp_path / "bridge.safetensors")
    loaded = Bridge.load(tmp_path / "bridge.safetensors")
    assert isinstance(loaded, Bridge)
    assert loaded.rank == 8
    states = torch.randn(3, widths[0], generator=generator)
    torch.testing.assert_close(loaded.project_student(1, states), bridge.project_student(1, states))
    assert list(arguments_of(Bridge.check))[:2] == ["student", "teacher"]
    loaded.check(wide.student, wide.teacher)
    with pytest.raises(ValueError, match="bridge"):
        loaded.check(wide.student, pair.teacher)


def test_readout_bridge_maps_into_the_student():
    wide = embedded("cross_architecture")
    begins_with(ReadoutBridge.fit, student=REQUIRED, teacher_rows=REQUIRED, targets=REQUIRED)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(512, wide.teacher.config.hidden_size, generator=generator)
    targets = torch.randint(0, 10, (512,), generator=generator)
    readout = ReadoutBridge.fit(wide.student, states, targets, steps=2)
    last = wide.student.config.num_hidden_layers
    assert readout.project_teacher(last, states[:3]).shape == (3, wide.student.config.hidden_size)


# objectives, training, evaluation


def test_terms_add_and_scale():
    accepts(Representation, layers="all", positions="last:2000", distance="normalized_mse", bridge=None)
    representation = Representation(
        layers="all", positions="last:2000", distance="normalized_mse", bridge=None
    )
    sampled = SampledTokenKL()
    objective = sampled + 10 * representation
    assert [(weight, term) for weight, term in objective.terms] == [(1.0, sampled), (10.0, representation)]
    assert objective.reduction == "token"
    more = objective + 0.5 * TopKKL() + FullKL()
    assert [weight for weight, _ in more.terms] == [1.0, 10.0, 0.5, 1.0]


def test_training_extends_trl():
    assert issubclass(OPRDConfig, DistillationConfig)
    arguments = arguments_of(OPRDTrainer)
    required = ["model", "teacher", "objective", "args", "train_dataset", "processing_class"]
    assert [name for name in required if arguments.get(name, None) is not REQUIRED] == []
    accepts(OPRDTrainer, peft_config=None, sampler=None)
    assert "resume_from_checkpoint" in arguments_of(OPRDTrainer.train)


def test_evaluate_gives_samples_and_a_summary(tmp_path, pair):
    begins_with(
        evaluate, sampler=REQUIRED, **{list(arguments_of(evaluate))[1]: REQUIRED}, n=16, temperature=0.7
    )
    sampler = HFSampler(pair.student, pair.tokenizer)
    path = tmp_path / "few.parquet"
    pair.task.test.select(range(3)).to_parquet(path)
    result = evaluate(sampler, load_task(path), n=2, temperature=0.7, max_new_tokens=24)
    assert len(result.samples) == 6
    assert {"problem", "response", "correct"} <= set(result.samples.columns)
    assert {"metric", "value", "low", "high"} <= set(result.summary.columns)


def test_evaluate_takes_problems_or_a_task(pair):
    problems = pair.task.test.select(range(2))
    result = evaluate(
        HFSampler(pair.student, pair.tokenizer), problems, n=1, temperature=0, max_new_tokens=24
    )
    assert len(result.samples) == 2
