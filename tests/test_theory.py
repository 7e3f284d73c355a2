"""The three theorems: estimates against exact sums, what a head cannot see, E(r) as a distance."""

import copy

import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from oprd_nb.core import set_seed
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.structure.moments import Moments, planted_pair
from oprd_nb.teachers import Teacher
from oprd_nb.theory import (
    blindness_figure,
    fit_power_law,
    gradient_noise,
    head_blindness,
    interpolate_weights,
    noise_figure,
    rank_tradeoff,
    resample_next_tokens,
    signal_and_noise,
    symmetric_kl,
    tradeoff_figure,
)


@pytest.fixture(scope="module")
def pair():
    pair = embedded("same")
    pair.student.eval()
    return pair


@pytest.fixture(scope="module")
def rollouts(pair):
    return HFSampler(pair.student, pair.tokenizer).sample(
        pair.task.train["prompt"][:3], max_new_tokens=12, seed=0
    )


def test_estimates_are_unbiased_and_exact_where_draws_agree():
    set_seed(0)
    estimates = [signal_and_noise(1 + 2 * torch.randn(10) for _ in range(5)) for _ in range(2000)]
    assert torch.tensor(estimates).mean(0).tolist() == pytest.approx([10, 40], rel=0.1)
    assert signal_and_noise([torch.tensor([3.0, 4.0])] * 2) == (25.0, 0.0)
    with pytest.raises(ValueError, match="1 of them"):
        signal_and_noise([torch.ones(3)])


def test_redrawn_tokens_leave_prompts_and_pads_alone(pair, rollouts):
    ids = resample_next_tokens(pair.student, rollouts, draws=40, seed=0)
    assert ids.shape == (40, *rollouts.input_ids.shape)
    elsewhere = ~rollouts.response_mask
    assert (ids[:, elsewhere] == rollouts.input_ids[elsewhere]).all()
    assert (ids[:, rollouts.response_mask].float().std(0) > 0).any()
    with torch.no_grad():
        p = pair.student(rollouts.input_ids, attention_mask=rollouts.attention_mask.long()).logits.softmax(-1)
    many = resample_next_tokens(pair.student, rollouts, 4000, seed=1)
    response, column = rollouts.response_mask.nonzero()[-1].tolist()
    counted = torch.bincount(many[:, response, column], minlength=p.shape[-1]) / 4000
    predicting = p[response, column - 1]
    assert (counted - predicting).abs().max() < 0.03, "drawn from the distribution that predicts the token"


def test_only_the_sampled_token_is_noisy(pair, rollouts):
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    terms = {
        "sampled": SampledTokenKL(),
        "full": FullKL(),
        "rep": Representation(positions="all"),
        "half": Representation(layers="even", positions="all"),
    }
    table = gradient_noise(pair.student, teacher, rollouts, pair.tokenizer, terms, shares=(1, 0.5), draws=3)
    noise = table.groupby("term").noise.max()
    assert noise["sampled"] > 0 and (noise.drop("sampled") == 0).all()
    assert (table[table.term != "sampled"].signal > 0).all()
    distance = symmetric_kl(pair.student, pair.teacher, rollouts)
    assert table.divergence.iloc[0] == pytest.approx(distance) and len(table) == 8
    fig = noise_figure(table)
    names = ["sampled", "sampled", "full: no noise", "rep: no noise", "half: no noise"]
    assert [trace.name for trace in fig.data] == names
    assert fig.layout.xaxis.type == fig.layout.yaxis.type == "log"
    assert len({trace.line.color for trace in fig.data}) == 4 and fig.data[1].line.dash == "dot"


def tiny_tied_model():
    config = Qwen3Config(
        vocab_size=16,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return AutoModelForCausalLM.from_config(config)


def test_the_ends_of_the_path_are_the_two_models(pair, rollouts):
    at_teacher = interpolate_weights(pair.student, pair.teacher, 0.0)
    assert symmetric_kl(at_teacher, pair.teacher, rollouts) == pytest.approx(0, abs=1e-8)
    at_student = interpolate_weights(pair.student, pair.teacher, 1.0).state_dict()
    assert all(torch.equal(w, at_student[name]) for name, w in pair.student.state_dict().items())


def test_a_path_keeps_embeddings_tied():
    first = tiny_tied_model()
    second = tiny_tied_model()
    middle = interpolate_weights(first, second, 0.25)
    assert middle.lm_head.weight is middle.model.embed_tokens.weight
    expected = 0.25 * first.lm_head.weight + 0.75 * second.lm_head.weight
    assert torch.allclose(middle.lm_head.weight, expected)


def test_models_without_a_path_are_refused(rollouts):
    wide = embedded("cross_architecture")
    with pytest.raises(ValueError, match="one architecture"):
        interpolate_weights(wide.student, wide.teacher, 0.5)
    other = embedded("cross_tokenizer")
    teacher = Teacher(other.teacher, other.teacher_tokenizer)
    with pytest.raises(ValueError, match="tokenizers"):
        gradient_noise(other.student, teacher, rollouts, other.tokenizer, {"full": FullKL()})


def test_a_power_is_found():
    delta = torch.logspace(-6, 0, 7).numpy()
    table = pd.DataFrame({"divergence": delta, "noise": 3 * delta**1.5})
    assert fit_power_law(table, "noise") == pytest.approx(1.5)


def test_a_head_is_blind_to_its_null_space(pair):
    table = head_blindness(pair.student, torch.randn(20, 96))
    assert len(table) == 96 and (table.singular_value == 0).sum() == 76
    assert table.singular_value.is_monotonic_decreasing
    few = head_blindness(pair.student, torch.randn(20, 96), directions=5)
    assert list(few.direction) == [1, 25, 49, 72, 96]
    fig = blindness_figure(table)
    assert len(fig.data[1].x) == 20 and fig.data[1].y[0] == 1
    assert "76 directions are not seen" in fig.layout.meta["subtitle"]
    with pytest.raises(ValueError, match=r"shape \(20, 95\)"):
        head_blindness(pair.student, torch.randn(20, 95))
    with pytest.raises(ValueError, match="bfloat16"):
        head_blindness(copy.deepcopy(pair.student).bfloat16(), torch.randn(20, 96))


def test_an_error_of_rank_is_a_distance():
    eigenvalues = torch.tensor([8.0, 4, 2, 1, 0.5, 0.25])
    planted = planted_pair(200, eigenvalues, torch.tensor([0.9, 0.8, 0.7, 0.3, 0.2, 0.1]), 6)
    states = (planted.student, planted.teacher)
    moments = Moments([(1, 2)], 6, 6)
    moments.update((1, 2), *states)
    table = rank_tradeoff(moments, (1, 2), {(1, 2): states}, ridge=0)
    # Least squares on its own states: exactly the formula.
    assert (table.measured - table.total).abs().max() < 1e-8 * table.total.max()
    assert int(table.loc[table.total.idxmin(), "rank"]) == 3
    assert tradeoff_figure(table).layout.meta["subtitle"].startswith("the best rank is 3")
