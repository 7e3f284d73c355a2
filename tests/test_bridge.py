"""Both bridges: exact, refused if they do not fit, frozen whatever trains, and better than their start."""

import subprocess
import sys
import textwrap
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_qwen3
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from short_runs import short_run
from test_objectives import tiny_gpt2

from oprd_nb.bridge.base import HELD_OUT, BridgeMetadata, ModelSpec, spec_of
from oprd_nb.bridge.pca import Bridge, collect_moments, fit_bridge, refit_by_sgd, score_projections
from oprd_nb.bridge.readout import (
    KLTargets,
    ReadoutBridge,
    StoredKLTargets,
    TokenTargets,
    divergence,
    fit_readout,
    load_bridge,
    readout_states,
    retokenize,
)
from oprd_nb.capture import FINAL, capture_each, lm_head_of
from oprd_nb.core import Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.objective import loss_of, loss_on_pairs
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.objectives.terms import as_objective
from oprd_nb.pairing.positions import identity_pairs
from oprd_nb.probing.states import split_by_response
from oprd_nb.rollouts.prompts import encode_prompts
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.structure.moments import Moments
from oprd_nb.structure.ridge import fit_sgd
from oprd_nb.teachers import Teacher
from oprd_nb.training.trainer import OPRDTrainer

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the student's tokens")


class Setting:
    """A pair, its teacher, and text to fit on."""

    def __init__(self, name, responses):
        self.pair = embedded(name)
        self.student = self.pair.student.requires_grad_(False)
        self.tokenizer = self.pair.tokenizer
        self.teacher = Teacher(self.pair.teacher, self.pair.teacher_tokenizer)
        prompts = self.pair.task.train["prompt"][:responses]
        self.rollouts = HFSampler(self.student, self.tokenizer).sample(prompts, max_new_tokens=40)
        self.all = (self.student, self.teacher, self.rollouts, self.tokenizer)


@pytest.fixture(scope="module")
def wide():
    return Setting("cross_architecture", 256)


@pytest.fixture(scope="module")
def tokens():
    setting = Setting("cross_tokenizer", 256)
    written = HFSampler(setting.teacher.model, setting.teacher.tokenizer).sample(
        setting.pair.task.train["prompt"][:256], max_new_tokens=40
    )
    setting.text = retokenize(written, setting.teacher.tokenizer, setting.tokenizer)
    return setting


@pytest.fixture(scope="module")
def rank8(wide):
    return fit_bridge(*wide.all)


@pytest.fixture(scope="module")
def readout(wide):
    return fit_readout(*wide.all, steps=200)


@pytest.fixture(scope="module")
def by_offset(tokens):
    return fit_readout(tokens.student, tokens.teacher, tokens.text, tokens.tokenizer, steps=200)


def gaussian(rows=200, d_student=6, d_teacher=7, seed=0):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, d_student, generator=g, dtype=torch.float64)
    mixed = student @ torch.randn(d_student, d_teacher, generator=g, dtype=torch.float64)
    noise = torch.randn(rows, d_teacher, generator=g, dtype=torch.float64)
    return student, mixed + 3 + noise


def seen(student, teacher, pair=(2, 3)):
    moments = Moments([pair], student.shape[1], teacher.shape[1])
    moments.update(pair, student, teacher)
    return moments


def readout_of(width=3, offsets=(0, 1), depth=4, d_teacher=5):
    """A readout with random maps."""
    g = torch.Generator().manual_seed(0)
    header = BridgeMetadata(
        [(depth, FINAL)], ModelSpec(width), ModelSpec(d_teacher), width, "by hand", 10, offsets
    )
    return ReadoutBridge(
        header,
        {
            "weight": torch.randn(len(offsets), width, d_teacher, generator=g),
            "bias": torch.randn(len(offsets), width, generator=g),
        },
    )


# exact where they must be


class BareTeacher(Teacher):
    """A teacher that is given tokens and never text: it needs no tokenizer."""

    def __post_init__(self):
        pass


@pytest.mark.parametrize("final_norm, layers", [(True, [1, 2]), (False, [1, 2, 3])])
def test_a_student_that_is_its_teacher_has_its_coordinates_and_no_loss(final_norm, layers):
    """r = d, ridge = 0, float64; GPT-2 and raw states, since a LayerNorm's output has one dimension less."""
    model = tiny_gpt2(0)
    ids = torch.randint(0, 40, (12, 45), generator=torch.Generator().manual_seed(0)).tolist()
    rollouts = Rollouts.from_ids([row[:5] for row in ids], [row[5:] for row in ids], 0)
    pairs = identity_pairs(rollouts)
    with torch.no_grad():
        states = capture_each(
            model,
            rollouts.input_ids,
            rollouts.attention_mask,
            dict.fromkeys(layers, rollouts.response_mask),
            final_norm,
        )
    moments = Moments([(layer, layer) for layer in layers], 32, 32)
    for layer in layers:
        moments.update((layer, layer), states[layer], states[layer])
    made = Bridge.fit(moments, rank=32, ridge=0)
    for layer in layers:
        of_student = made.project_student(layer, states[layer])
        of_teacher = made.project_teacher(layer, states[layer])
        assert of_student.dtype == torch.float64
        assert (of_student - of_teacher).abs().max() <= 1e-6 * of_teacher.abs().max()
    for distance in ("mse", "normalized_mse", "cosine"):
        objective = as_objective(
            Representation(
                layers=layers, positions="all", distance=distance, bridge=made, final_norm=final_norm
            )
        )
        counts = objective.counts(pairs)
        loss, _ = loss_on_pairs(objective, model, BareTeacher(model, None), rollouts, pairs, counts)
        assert abs(loss.item()) <= 1e-10


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(0, 5), st.sampled_from([0.0, 1e-3, None]))
def test_a_smaller_rank_is_the_first_rows(rank, seed, ridge):
    student, teacher = gaussian(seed=seed)
    moments = seen(student, teacher)
    full = Bridge.fit(moments, 7, ridge)
    small = Bridge.fit(moments, rank, ridge)
    for name, tensor in full.truncate(rank).tensors.items():
        assert torch.allclose(tensor, small.tensors[name], atol=1e-12)
    assert torch.allclose(
        full.project_student(2, student)[:, :rank], small.project_student(2, student), atol=1e-10
    )


def test_projections_are_eq_13_written_out():
    student, teacher = gaussian()
    made = Bridge.fit(seen(student, teacher), 3, ridge=0)
    centred = teacher - teacher.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    z = centred @ vectors.flip(1)[:, :3]
    of_teacher = made.project_teacher(2, teacher)
    assert torch.allclose(of_teacher.abs(), z.abs(), atol=1e-8)  # an eigenvector's sign is free
    one = torch.cat([student, torch.ones(len(student), 1)], 1)
    assert torch.allclose(
        made.project_student(2, student), one @ torch.linalg.lstsq(one, of_teacher).solution, atol=1e-8
    )


def test_the_recipe_is_an_option_and_has_no_bias():
    student, teacher = gaussian()
    closed = Bridge.fit(seen(student, teacher), 3)
    made = refit_by_sgd(closed, {(2, 3): (student, teacher)}, heldout={(2, 3): gaussian(50)})
    assert made.header.recipe == "sgd" and not made.tensors["2.student.mean"].any()
    assert list(made.scores["rank"]) == [1, 2, 3]
    alone = fit_sgd(student, made.project_teacher(2, teacher))
    assert torch.equal(made.tensors["2.student.weight"], alone)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 4]), min_size=0, max_size=12))
def test_each_state_is_mapped_by_its_own_offset(offsets):
    made = readout_of(offsets=(0, 1, 4))
    hidden = torch.randn(len(offsets), 5, generator=torch.Generator().manual_seed(1))
    together = made.project_teacher(4, hidden, torch.tensor(offsets, dtype=torch.long))
    for state, offset, mapped in zip(hidden, offsets, together, strict=True):
        i = made.offsets.index(offset)
        assert torch.allclose(mapped, made.tensors["weight"][i] @ state + made.tensors["bias"][i], atol=1e-6)
    zeros = torch.zeros(len(hidden), dtype=torch.long)
    assert torch.equal(made.project_teacher(4, hidden), made.project_teacher(4, hidden, zeros))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_maps_are_applied_in_float32_inside_autocast(dtype):
    student, teacher = (x.to(dtype) for x in gaussian())
    pca = Bridge.fit(seen(student, teacher), 3)
    read = readout_of(d_teacher=7)
    plain = pca.project_student(2, student), pca.project_teacher(2, teacher), read.project_teacher(4, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = (
            pca.project_student(2, student),
            pca.project_teacher(2, teacher),
            read.project_teacher(4, teacher),
        )
    for a, b in zip(plain, inside, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


# files


@pytest.mark.parametrize("kind", ["bridge", "readout"])
def test_a_file_brings_back_every_bit(kind, rank8, readout, tmp_path):
    made = {"bridge": rank8, "readout": readout}[kind]
    for path in (made.save(tmp_path / "folder"), made.save(tmp_path / "named.safetensors")):
        for again in (load_bridge(path), type(made).load(path)):
            assert again.header == made.header and all(
                torch.equal(again.tensors[name], made.tensors[name]) for name in made.tensors
            )
    assert load_bridge(tmp_path / "folder").scores.equals(made.scores) and not list(tmp_path.rglob("*.part"))


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 0.999))
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, share):
    path = readout_of().save(tmp_path_factory.mktemp("cut"))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="cannot be read as a bridge") as error:
        load_bridge(path)
    assert "\n" not in str(error.value)


def test_files_that_are_something_else(rank8, readout, tmp_path):
    rank8.save(tmp_path / "a")
    readout.save(tmp_path / "b")
    seen(*gaussian()).save(tmp_path / "c" / "bridge.safetensors")
    for load, folder, message in [
        (ReadoutBridge.load, "a", "holds a Bridge.*load it with Bridge.load"),
        (Bridge.load, "b", "holds a ReadoutBridge"),
        (load_bridge, "c", "holds no bridge"),
        (load_bridge, "nowhere", "cannot be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path / folder)


def test_a_header_that_does_not_describe_its_tensors_is_refused(rank8):
    for header in (
        replace(rank8.header, dimension=9),
        replace(rank8.header, layer_pairs=[(1, 1)]),
        replace(rank8.header, student=ModelSpec(97)),
    ):
        with pytest.raises(ValueError, match="tensors"):
            Bridge(header, rank8.tensors)


# what does not fit


def test_the_metadata_name_both_models(rank8, readout, wide):
    assert rank8.layer_pairs == [(1, 1), (2, 3), (3, 4), (4, 6)] and readout.layer_pairs == [(4, 6)]
    for made in (rank8, readout):
        assert (made.header.student, made.header.teacher) == (
            spec_of(wide.student, wide.tokenizer),
            spec_of(wide.teacher.model, wide.teacher.tokenizer),
        )
        assert made.header.rows > 1000 and made.header.coverage == 1
        assert made.header.final_norm and len(made.scores)
        made.check(wide.student, wide.teacher, wide.tokenizer)
        made.check(wide.student, wide.teacher.model)


def test_other_models_are_refused_with_the_reason(rank8, readout, wide, tokens):
    same_width = tiny_qwen3(vocab_size=21, layers=4, width=96)
    deeper = tiny_qwen3(vocab_size=21, layers=5, width=96)
    for made in (rank8, readout):
        for student, teacher, tokenizer, options, message in [
            (wide.student, tokens.teacher, wide.tokenizer, {}, "another teacher.*width 96 in place of 128"),
            (wide.teacher.model, wide.teacher, wide.tokenizer, {}, "another student.*width"),
            (deeper, wide.teacher, wide.tokenizer, {}, "another student.*depth 5 in place of 4"),
            (wide.student, wide.teacher, tokens.teacher.tokenizer, {}, "another student.*tokenizer"),
            (
                same_width,
                Teacher(wide.teacher.model, wide.teacher.tokenizer),
                wide.tokenizer,
                {"final_norm": False},
                "final_norm=False",
            ),
        ]:
            with pytest.raises(ValueError, match=message) as error:
                made.check(student, teacher, tokenizer, **options)
            assert "\n" not in str(error.value)
        made.check(same_width, wide.teacher, wide.tokenizer)  # another checkpoint of the student's shape fits


def test_equal_shapes_do_not_hide_another_tokenizer(tokens):
    """The embedded teachers of `same` and `cross_tokenizer` have the same width and depth."""
    same = embedded("same")
    made = fit_bridge(
        same.student, Teacher(same.teacher, same.teacher_tokenizer), tokens.rollouts, same.tokenizer
    )
    for teacher in (tokens.teacher, tokens.teacher.model):
        with pytest.raises(ValueError, match="another teacher .(tokenizer|vocabulary)"):
            made.check(same.student, teacher, same.tokenizer)
    renamed = Bridge(
        replace(made.header, teacher=replace(made.header.teacher, name="somebody")), made.tensors
    )
    with pytest.warns(UserWarning, match="fitted for the teacher 'somebody'"):
        renamed.check(same.student, Teacher(same.teacher, same.teacher_tokenizer), same.tokenizer)


def test_maps_of_bare_states_know_their_widths_and_are_told_the_rest(wide, rank8):
    student, teacher = gaussian(300, 96, 128)
    made = Bridge.fit(seen(student, teacher, (9, 9)), 2)
    with pytest.raises(ValueError, match="student layers .9., this one has 4"):
        made.check(wide.student, wide.teacher)
    fits = Bridge.fit(seen(student, teacher, (4, 6)), 2).bind(wide.student, wide.teacher, wide.tokenizer)
    assert fits.header.teacher.depth == 6 and fits.header.student.tokenizer == rank8.header.student.tokenizer


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Bridge.fit(seen(*gaussian()), 8), "rank=8: use 'auto' or an integer from 1 to 7"),
        (lambda: Bridge.fit(seen(*gaussian()), 0), "rank=0"),
        (lambda: Bridge.fit(seen(*gaussian()), "best"), "rank='best'"),
        (
            lambda: Bridge.fit(seen(torch.randn(200, 6), torch.randn(200, 7)), "auto"),
            "rank='auto'.*ReadoutBridge",
        ),
        (lambda: Bridge.fit(Moments([(1, 1), (1, 2)], 6, 7)), "name a student layer twice"),
        (lambda: Bridge.fit(seen(*gaussian()), 2).truncate(3), "rank=3: this bridge has rank 2"),
        (
            lambda: Bridge.fit(seen(*gaussian()), 2).project_student(1, torch.zeros(1, 6)),
            "maps for student layers .2.",
        ),
        (
            lambda: Bridge.fit(seen(*gaussian()), 2).project_teacher(
                2, torch.zeros(2, 7), torch.tensor([0, 1])
            ),
            "shared byte boundaries only",
        ),
        (lambda: readout_of().project_teacher(4, torch.zeros(2, 5), torch.tensor([0, 2])), ".2. have no map"),
        (lambda: readout_of().project_student(3, torch.zeros(2, 3)), "last layer only, 4"),
        (
            lambda: ReadoutBridge.fit(tiny_qwen3(), torch.randn(60, 8), torch.zeros(60, dtype=torch.long)),
            "a readout needs at least 100",
        ),
        (
            lambda: ReadoutBridge.fit(tiny_qwen3(), torch.randn(200, 8), torch.zeros(60, dtype=torch.long)),
            "targets: 60 for 200",
        ),
        (lambda: retokenize(Rollouts.from_ids([[1]], [[2]], 0), None, None), "rollouts.prompts is None"),
    ],
)
def test_bad_requests_name_argument_value_and_way_out(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


# frozen, and part of any objective


def bits(made):
    return {name: tensor.clone() for name, tensor in made.tensors.items()}


def representation(made):
    layers = "last" if isinstance(made, ReadoutBridge) else "all"
    return Representation(layers=layers, positions="all", predicting=layers == "last", bridge=made)


@pytest.mark.parametrize("kind", ["bridge", "readout"])
def test_training_moves_the_student_and_not_the_bridge(kind, rank8, readout, tmp_path):
    made = {"bridge": rank8, "readout": readout}[kind]
    fresh = Setting("cross_architecture", 2)
    before = bits(made)
    weights = {name: p.clone() for name, p in fresh.student.named_parameters()}
    args = short_run(tmp_path, max_steps=2, gradient_accumulation_steps=2, weight_decay=0.1)
    trainer = OPRDTrainer(
        model=fresh.student.requires_grad_(True),
        teacher=fresh.teacher,
        objective=representation(made),
        args=args,
        train_dataset=fresh.pair.task.train,
        processing_class=fresh.tokenizer,
    )
    optimised = {id(p) for group in trainer.create_optimizer().param_groups for p in group["params"]}
    trainer.train()
    for name, tensor in made.tensors.items():
        assert torch.equal(before[name], tensor) and id(tensor) not in optimised
        assert not tensor.requires_grad and tensor.grad is None
    moved = {name for name, p in fresh.student.named_parameters() if not torch.equal(p, weights[name])}
    assert "model.layers.0.mlp.down_proj.weight" in moved and "lm_head.weight" not in moved


@pytest.mark.parametrize("kind", ["bridge", "readout"])
@pytest.mark.parametrize(
    "other", [FullKL(), SampledTokenKL(), SampledTokenKL(control_variate=True)], ids=repr
)
def test_terms_add_up(kind, other, rank8, readout, wide):
    term = representation({"bridge": rank8, "readout": readout}[kind])
    student = embedded("cross_architecture").student
    few = Rollouts.from_ids(wide.rollouts.prompt_ids()[:16], wide.rollouts.responses()[:16], 0)
    weight = student.model.layers[1].mlp.down_proj.weight

    def gradient(objective):
        loss, _ = loss_of(objective, student, wide.teacher, few, wide.tokenizer)
        return torch.autograd.grad(loss, weight)[0]

    sum_of_gradients = gradient(other) + 10 * gradient(term)
    assert torch.allclose(gradient(other + 10 * term), sum_of_gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["bridge", "readout"])
def test_adapters_train_through_it(kind, rank8, readout, wide):
    made = {"bridge": rank8, "readout": readout}[kind]
    plain = embedded("cross_architecture").student
    before = loss_of(representation(made), plain, wide.teacher, wide.rollouts, wide.tokenizer)[0].item()
    adapted = get_peft_model(plain, LoraConfig(r=4, target_modules="all-linear"))
    made.check(adapted, wide.teacher, wide.tokenizer)
    optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(4):
        loss = loss_of(representation(made), adapted, wide.teacher, wide.rollouts, wide.tokenizer)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (
        all("lora_" in name for name, p in adapted.named_parameters() if p.grad is not None)
        and loss.item() < before
    )


# other tokenizers


def test_positions_without_a_map_are_not_supervised(tokens, by_offset):
    pairs = tokens.teacher.read(tokens.rollouts, tokens.tokenizer)
    assert by_offset.offsets == (0, 1) and set(pairs.offset.tolist()) == {0, 1}
    boundaries = ReadoutBridge(
        replace(by_offset.header, offsets=(0,)),
        {name: tensor[:1] for name, tensor in by_offset.tensors.items()},
    )
    every, at_boundary = (representation(made).mask(pairs) for made in (by_offset, boundaries))
    assert torch.equal(at_boundary, every & (pairs.offsets == 0)) and 0 < at_boundary.sum() < every.sum()
    for made in (by_offset, boundaries, fit_bridge(*tokens.all)):
        term = representation(made)
        rows = term.mask(pairs)
        assert (
            as_objective(term).counts(pairs).item() == rows.sum()
            and torch.isin(pairs.offsets[rows], torch.tensor(made.offsets)).all()
        )
        assert torch.isfinite(
            loss_of(term, tokens.student, tokens.teacher, tokens.rollouts, tokens.tokenizer)[0]
        )


def test_micro_batches_add_up_across_tokenizers(tokens, by_offset):
    student = embedded("cross_tokenizer").student
    objective = as_objective(representation(by_offset))
    counts = objective.counts(tokens.teacher.read(tokens.rollouts, tokens.tokenizer))

    def gradient(which):
        r = tokens.rollouts
        part = Rollouts.from_ids(
            [r.prompt_ids()[i] for i in which],
            [r.responses()[i] for i in which],
            0,
            [r.prompts[i] for i in which],
        )
        value = loss_of(objective, student, tokens.teacher, part, tokens.tokenizer, counts)[0]
        return torch.autograd.grad(value, student.model.layers[0].mlp.down_proj.weight)[0]

    whole = gradient(range(256))
    assert torch.allclose(whole, gradient(range(100)) + gradient(range(100, 256)), rtol=1e-4, atol=1e-7)


def test_text_in_another_models_tokens(tokens):
    writer = tokens.teacher.tokenizer
    reader = tokens.tokenizer
    prompts = tokens.pair.task.train["prompt"][:3]
    bodies = [writer.encode(text, add_special_tokens=False) for text in ("37+58=95", "1+2")]
    written = Rollouts.from_ids(
        [[5]] * 3,
        [bodies[0] + [writer.eos_token_id], bodies[1], [writer.convert_tokens_to_ids("<|user|>")]],
        0,
        prompts,
    )
    read = retokenize(written, writer, reader)
    assert len(read) == 2 and read.texts(reader) == ["37+58=95", "1+2"] and read.prompts == prompts[:2]
    assert [ids[-1] == reader.eos_token_id for ids in read.responses()] == [True, False]
    again = tokens.teacher.read(read, reader)
    assert again.coverage == 1 and again.teacher_inputs.responses() == [
        bodies[0] + [writer.eos_token_id],
        bodies[1],
    ]


# better than what they start from


def test_the_closed_form_is_as_good_as_the_recipe(wide):
    """At r = 8 and every learning rate: held-out R² at least the recipe's, cosine at most 0.005 below it."""
    collected = collect_moments(*wide.all, keep_fitted=True)
    closed = Bridge.fit(collected.moments, 8, heldout=collected.heldout, groups=collected.groups)
    solved = closed.score(collected.heldout).groupby("rank")[["cosine", "r2"]].mean().loc[8]
    for rate in (1e-3, 1e-2, 3e-2):
        by_recipe = refit_by_sgd(closed, collected.fitted, learning_rate=rate)
        recipe = by_recipe.score(collected.heldout).groupby("rank")[["cosine", "r2"]].mean().loc[8]
        assert solved.r2 >= recipe.r2 and solved.cosine >= recipe.cosine - 0.005


def test_held_out_responses_are_never_fitted_and_their_states_are_few(wide, monkeypatch):
    monkeypatch.setattr("oprd_nb.bridge.pca.HELD_OUT_STATES", 100)
    collected = collect_moments(*wide.all, layers="2,4", positions="last:5")
    assert len(collected.groups.unique()) <= 51 and 60 <= len(collected.groups) <= 140
    assert collected.fitted == {}
    held = split_by_response(torch.arange(256), HELD_OUT)
    assert held[collected.groups].all()
    for student, teacher in collected.heldout.values():
        assert len(student) == len(teacher) == len(collected.groups)
    fitted = wide.rollouts.response_lengths[~held].clamp(max=5).sum()
    assert collected.moments.layer_pairs == [(2, 3), (4, 6)] and collected.moments[2, 3].count == fitted


def test_readout_kl_falls(wide, readout):
    score = readout.scores.iloc[0]
    assert score.student > 2 * score.ridge > 4 * score.fitted and score.fitted < 0.02
    rows = readout_states(*wide.all)
    held = split_by_response(rows.responses, HELD_OUT)
    states = readout.project_teacher(4, rows.teacher[held])
    read = lm_head_of(wide.student)(states).log_softmax(-1)
    q = lm_head_of(wide.teacher.model)(rows.teacher[held]).log_softmax(-1)
    assert (q.exp() * (q - read)).sum(-1).mean().item() == pytest.approx(score.fitted, rel=1e-3)


def test_cross_entropy_falls_at_every_offset(by_offset):
    scores = by_offset.scores
    assert list(scores.offset) == [0, 1] and scores["share"].sum() == pytest.approx(1)
    assert (scores.student > scores.ridge).all() and (scores.fitted < 0.7 * scores.ridge).all()
    assert by_offset.header.recipe == "cross-entropy" and by_offset.header.coverage > 0.99


def test_targets_in_any_form_give_one_map(wide):
    states = readout_states(*wide.all)
    head = lm_head_of(wide.teacher.model)
    with torch.no_grad():
        logits = head(states.teacher)
    plain = [head, logits, logits.log_softmax(-1), logits.softmax(-1)]
    typed = [KLTargets(head), StoredKLTargets(logits)]
    made = [ReadoutBridge.fit(wide.student, states.teacher, form, steps=30) for form in plain + typed]
    weight = made[0].tensors["weight"]
    for other in made[1:]:
        assert torch.allclose(other.tensors["weight"], weight, atol=1e-3) and other.header.recipe == "KL"
    assert "student" not in made[0].scores and made[0].layer_pairs == [(4, FINAL)]
    # From zero, the map stays in the span of the head's rows.
    head_rows = torch.linalg.svd(wide.student.lm_head.weight.detach(), full_matrices=False).Vh
    outside = weight[0] - head_rows.T @ (head_rows @ weight[0])
    assert outside.norm() < 0.02 * weight[0].norm()
    for ids in (states.next_tokens, TokenTargets(states.next_tokens)):
        by_ids = ReadoutBridge.fit(wide.student, states.teacher, ids, states.student, steps=30)
        assert by_ids.header.recipe == "cross-entropy" and by_ids.scores.fitted[0] <= by_ids.scores.ridge[0]


def test_vocabularies_padded_to_other_widths():
    logits = torch.randn(6, 9, generator=torch.Generator().manual_seed(0))
    target = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)).softmax(-1)
    expected = divergence(logits, target)
    assert torch.allclose(divergence(logits, F.pad(target, (0, 5))), expected)
    assert torch.allclose(divergence(F.pad(logits, (0, 5)), target), expected)
    certain = F.one_hot(torch.arange(6), 9).float()
    of_tokens = TokenTargets(torch.arange(6)).losses(logits, torch.zeros(6, 3), torch.arange(6))
    assert torch.allclose(divergence(logits, certain), of_tokens, atol=1e-6)


def test_a_student_in_bfloat16():
    half = Setting("cross_architecture", 48)
    student = half.pair.student.bfloat16()
    teacher = Teacher(half.pair.teacher.bfloat16(), half.pair.teacher_tokenizer)
    for made in (
        fit_bridge(student, teacher, half.rollouts, half.tokenizer),
        fit_readout(student, teacher, half.rollouts, half.tokenizer, steps=30),
    ):
        loss, _ = loss_of(
            representation(made), student.requires_grad_(True), teacher, half.rollouts, half.tokenizer
        )
        assert loss.dtype == torch.float32 and torch.isfinite(loss)
        loss.backward()


def test_one_warning_for_all_unpaired_tokens(tokens):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = fit_bridge(*tokens.all)
    mine = [w for w in caught if "student's tokens" in str(w.message)]
    assert len(mine) == 1 and 0.5 < made.header.coverage < 0.95


SHAPES = textwrap.dedent("""
    from jaxtyping import install_import_hook
    import beartype
    # A whole number is a float, as for type checkers.
    beartype.beartype = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
    install_import_hook("oprd_nb", "beartype.beartype")
    import warnings
    from oprd_nb.bridge import fit_bridge
    from oprd_nb.models import embedded
    from oprd_nb.objectives import Representation, loss_of
    from oprd_nb.bridge.readout import fit_readout, retokenize
    from oprd_nb.rollouts import HFSampler
    from oprd_nb.teachers import Teacher

    warnings.simplefilter("ignore", UserWarning)
    pair = embedded("cross_tokenizer")
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    prompts = pair.task.train["prompt"][:64]
    rollouts = HFSampler(pair.student, pair.tokenizer).sample(prompts, max_new_tokens=40)
    written = HFSampler(pair.teacher, pair.teacher_tokenizer).sample(prompts, max_new_tokens=40)
    text = retokenize(written, pair.teacher_tokenizer, pair.tokenizer)
    bridge = fit_bridge(pair.student, teacher, rollouts, pair.tokenizer, "auto")
    readout = fit_readout(pair.student, teacher, text, pair.tokenizer, steps=3)
    for term in (
        Representation(bridge=bridge),
        Representation(layers="last", predicting=True, bridge=readout),
    ):
        loss_of(term, pair.student, teacher, rollouts, pair.tokenizer)
    print("checked")
""")


def test_shapes_in_signatures_hold():
    done = subprocess.run([sys.executable, "-c", SHAPES], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "checked", done.stderr[-2000:]


def test_each_state_is_read_by_the_map_of_its_offset_in_the_loss_too():
    made = readout_of(offsets=(0, 1), depth=4)
    term = Representation("last", "all", predicting=True, distance="mse", bridge=made)
    hidden = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 1, 1, 0, 1, 0])
    found = term.teacher_target(4, hidden, offsets)
    for offset in (0, 1):
        chosen = offsets == offset
        expected = hidden[chosen] @ made.tensors["weight"][offset].T + made.tensors["bias"][offset]
        assert torch.allclose(found[chosen], expected.float(), atol=1e-6)


def test_no_position_after_a_token_that_the_teacher_never_writes(tokens, by_offset, tmp_path):
    """What follows a `=` decides how the teacher reads it: `=4` is one token, `==` is two."""
    texts = ["37+58=95\n", "37+58==5\n", "37++8=95\n"]
    responses = tokens.tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = list(tokens.pair.task.train["prompt"][:3])
    rollouts = Rollouts.from_ids(encode_prompts(tokens.tokenizer, prompts), responses, 0, prompts)
    pairs = tokens.teacher.read(rollouts, tokens.tokenizer)
    term = Representation("last", "all", bridge=by_offset, distance="mse", predicting=True)
    every = ReadoutBridge(replace(by_offset.header, written=None), by_offset.tensors)
    before = Representation("last", "all", bridge=every, distance="mse", predicting=True).mask(pairs)
    left_out = []
    for response, text in enumerate(texts):
        first = int(rollouts.response_mask[response].nonzero()[0, 0])
        lost = (before & ~term.mask(pairs))[response].nonzero().squeeze(1) - first
        left_out.append([text[: int(at) + 1] for at in lost])
    # The second `=` is half of the teacher's `=5`: its last state is still the one after the lone `=`.
    assert left_out == [[], ["37+58=", "37+58=="], ["37+", "37++"]]
    assert load_bridge(by_offset.save(tmp_path)).header.written == by_offset.header.written


def test_maps_of_one_tokenizer_know_every_token(readout, rank8):
    assert readout.written is None and rank8.written is None


@pytest.mark.parametrize("facts", [{"width": True}, {"width": None}, {"width": 3, "depth": "4"}])
def test_facts_of_a_model_have_their_kinds(facts):
    wrong = list(facts)[-1]
    with pytest.raises(ValueError, match=f"{wrong}=.*: must be of the kind int"):
        ModelSpec(**facts)


# ---- scores on held-out states, by hand


def test_scores_of_known_projections():
    target = torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    prediction = torch.tensor([[2.0, 0.0], [0.0, 4.0]], dtype=torch.float64)
    table = score_projections(prediction, target, torch.tensor(50.0, dtype=torch.float64))
    assert table["rank"].tolist() == [1, 2]
    assert table["r2"].tolist() == pytest.approx([1 - 1 / 9, 1 - 1 / 25])
    assert table["explained_variance"].tolist() == pytest.approx([9 / 50, 25 / 50])
    assert table["cosine"].tolist() == pytest.approx([0.5, 1.0])  # at rank 1 the second target is zero


def test_explained_variance_is_a_share_of_what_is_around_the_teachers_mean():
    draw = torch.Generator().manual_seed(3)
    student = torch.randn(300, 4, generator=draw, dtype=torch.float64)
    teacher = 10 + torch.randn(300, 3, generator=draw, dtype=torch.float64)  # its mean is far from zero
    moments = Moments([(2, 3)], 4, 3)
    moments.update((2, 3), student, teacher)
    scores = Bridge.fit(moments, rank=3).score({(2, 3): (student, teacher)})
    assert scores["explained_variance"].iloc[-1] == pytest.approx(1, abs=1e-9)
