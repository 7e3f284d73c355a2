"""An LM head calibrated on the student's own responses: convex, held out, and nothing else moves."""

import copy

import pytest
import torch
from conftest import tiny_qwen3
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from oprd_nb import Teacher, embedded
from oprd_nb.objectives.heads import (
    FinalStates,
    calibrate_head,
    fit_head,
    head_kl,
    kl_of_logits,
    linear_head,
    set_head,
)
from oprd_nb.rollouts.samplers import HFSampler

SMALL = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
)


@pytest.fixture(autouse=True)
def seeded():
    """The same random heads every time."""
    torch.manual_seed(0)


def made_up_states(n=60, d=6, vocabulary=9, teacher_vocabulary=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    teacher = torch.randn(n, teacher_vocabulary, generator=generator)
    response = torch.arange(n) // 5
    return FinalStates(torch.randn(n, d, generator=generator), teacher, response, lambda hidden: hidden)


def test_the_measure_is_the_forward_kl():
    student, teacher = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert torch.allclose(kl_of_logits(student, teacher), expected)
    wider = torch.cat([student, torch.randn(7, 2, dtype=torch.float64)], 1)
    assert torch.equal(kl_of_logits(wider, teacher), kl_of_logits(student, teacher))


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_fitted_head_is_the_minimum(with_bias):
    states = made_up_states()
    weight = torch.randn(9, 6)
    bias = torch.randn(9) if with_bias else None
    fitted = fit_head(weight, bias, states, ridge=0.1, iterations=200).double().requires_grad_()
    logits = states.student.double() @ fitted.T + (bias.double() if with_bias else 0)
    loss = kl_of_logits(logits, states.teacher.double()).mean()
    penalty = 0.1 * states.student.double().square().mean() / 2
    (loss + penalty * (fitted - weight).square().sum()).backward()
    assert fitted.grad.abs().max() < 5e-4
    assert head_kl(fitted.detach(), bias, states) < head_kl(weight, bias, states)


def test_a_strong_penalty_keeps_the_head():
    states, weight = made_up_states(), torch.randn(9, 6)
    assert torch.allclose(fit_head(weight, None, states, ridge=1e6), weight, atol=1e-4)


def test_tokens_that_only_the_student_has_keep_their_rows():
    states, weight = made_up_states(teacher_vocabulary=7), torch.randn(9, 6)
    fitted = fit_head(weight, None, states)
    assert torch.equal(fitted[7:], weight[7:]) and not torch.equal(fitted[:7], weight[:7])


def test_tied_embeddings_stay_and_the_head_is_saved(tmp_path):
    model = tiny_qwen3(tie=True)
    embeddings = model.get_input_embeddings().weight
    before = embeddings.clone()
    assert linear_head(model).weight is embeddings
    set_head(model, before + 1)
    assert torch.equal(model.get_input_embeddings().weight, before)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.get_output_embeddings().weight, before + 1)
    assert torch.equal(loaded.get_input_embeddings().weight, before)


@pytest.fixture(scope="module")
def read():
    """The pair of two architectures, and responses of its student."""
    pair = embedded("cross_architecture")
    sampler = HFSampler(pair.student, pair.tokenizer)
    return pair, sampler.sample(pair.task.train["prompt"][:24], max_new_tokens=24)


def test_a_student_that_is_its_own_teacher_keeps_its_head(read):
    pair, rollouts = read
    before = linear_head(pair.student).weight
    fit = calibrate_head(pair.student, Teacher(pair.student, pair.tokenizer), rollouts, pair.tokenizer)
    assert fit.before == pytest.approx(0, abs=1e-6) and not fit.kept
    assert linear_head(pair.student).weight is before


def with_a_damaged_head(model, seed=0):
    """A copy whose head reads the states wrongly, by a fifth of its weights."""
    damaged = copy.deepcopy(model)
    weight = damaged.get_output_embeddings().weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        weight += (0.2 * weight.std() * noise).to(weight)
    return damaged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_damaged_head_is_mended(read, dtype):
    pair, rollouts = read
    student = with_a_damaged_head(pair.student).to(dtype)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    fit = calibrate_head(student, Teacher(pair.student, pair.tokenizer), rollouts, pair.tokenizer)
    assert fit.kept and fit.after < 0.5 * fit.before
    assert fit.positions < int(rollouts.response_lengths.sum())
    changed = [name for name, value in student.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == ["lm_head.weight"] and linear_head(student).weight.dtype == dtype


def test_adapters_elsewhere_are_no_obstacle(read):
    pair, rollouts = read
    student = get_peft_model(with_a_damaged_head(pair.student), LoraConfig(target_modules=["q_proj"]))
    assert calibrate_head(student, Teacher(pair.student, pair.tokenizer), rollouts, pair.tokenizer).kept


def test_what_cannot_be_calibrated_is_refused(read):
    pair, rollouts = read
    for cap in (0.5, 30.0):
        capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, final_logit_softcapping=cap))
        with pytest.raises(ValueError, match="scales or caps its logits"):
            linear_head(capped)
    adapted = get_peft_model(tiny_qwen3(), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="merge adapters"):
        linear_head(adapted)
    other = embedded("cross_tokenizer")
    teacher = Teacher(other.teacher, other.teacher_tokenizer)
    with pytest.raises(ValueError, match="different tokenizers"):
        calibrate_head(pair.student, teacher, rollouts, pair.tokenizer)
    with pytest.raises(ValueError, match="share=1.5"):
        calibrate_head(
            pair.student, Teacher(pair.teacher, pair.tokenizer), rollouts, pair.tokenizer, share=1.5
        )
