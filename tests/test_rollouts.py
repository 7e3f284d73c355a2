"""Samplers: what they promise to every caller."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_qwen3
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from scipy import stats
from transformers import GPT2Config, GPT2LMHeadModel

from oprd_nb.core import Rollouts
from oprd_nb.models.loading import end_tokens, load_model
from oprd_nb.models.pairs import embedded
from oprd_nb.rollouts import samplers, writing
from oprd_nb.rollouts.batches import bytes_per_token, run_in_batches
from oprd_nb.rollouts.prompts import encode_prompts
from oprd_nb.rollouts.samplers import (
    HFSampler,
    ReplaySampler,
    logprob_differences,
    logprob_gap,
    response_log_probs,
)
from oprd_nb.rollouts.settings import SamplingSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from families import tiny_model


def test_batches_change_neither_order_nor_greedy_answers(same):
    prompts = same.task.test["prompt"][:7]
    answers = [
        HFSampler(same.student, same.tokenizer, batch_size=size)
        .sample(prompts, n=2, temperature=0, max_new_tokens=12)
        .responses()
        for size in (3, 64)
    ]
    assert answers[0] == answers[1] and all(answers[0][i] == answers[0][i + 1] for i in range(0, 14, 2))


def test_a_stored_generation_configuration_does_not_leak_in(same):
    """A chat model's top_p, top_k or repetition penalty would make rollouts that are not on-policy."""
    sampler = HFSampler(same.student, same.tokenizer)
    plain = sampler.sample(same.task.test["prompt"][:8], max_new_tokens=12, seed=3).responses()
    same.student.generation_config.update(top_p=0.1, top_k=1, repetition_penalty=5.0, temperature=0.01)
    assert sampler.sample(same.task.test["prompt"][:8], max_new_tokens=12, seed=3).responses() == plain
    assert same.student.generation_config.top_k == 1  # and is left as it was


def test_training_mode_and_random_state_survive(same):
    same.student.train()
    state = torch.get_rng_state()
    HFSampler(same.student, same.tokenizer).sample(same.task.test["prompt"][:2], max_new_tokens=3)
    assert same.student.training and torch.equal(torch.get_rng_state(), state)


def test_every_declared_end_of_turn_ends_a_response(same):
    same.student.generation_config.eos_token_id = [5, 2]
    assert end_tokens(same.student, same.tokenizer) == [2, 5]


def test_sampled_frequencies_are_the_models():
    """Temperature 1 without filters: the first token follows the model's distribution (chi-squared)."""
    pair = embedded("same")
    model = tiny_qwen3(vocab_size=21)
    prompt = [4, 7, 9]
    first = [
        r[0]
        for r in HFSampler(model, pair.tokenizer, batch_size=4000)
        .sample([prompt], n=4000, max_new_tokens=1, seed=0)
        .responses()
    ]
    expected = (
        model(input_ids=torch.tensor([prompt])).logits[0, -1].detach().double().softmax(-1).numpy() * 4000
    )
    observed = torch.bincount(torch.tensor(first), minlength=21).numpy()
    assert stats.chisquare(observed, expected).pvalue > 0.001


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(n=0), "n=0"),
        (dict(max_new_tokens=0), "max_new_tokens=0"),
        (dict(temperature=-1), "temperature=-1"),
        (dict(temperature=float("nan")), "temperature=nan"),
        (dict(temperature=float("inf")), "temperature=inf"),
        (dict(temperature=1e-9), "temperature=1e-09: use 0"),
        (dict(temperature="hot"), "temperature='hot'"),
        (dict(top_p=0), "top_p=0: must be a number from 1e-06 to 1"),
        (dict(top_p=float("nan")), "top_p=nan"),
        (dict(top_k=-1), "top_k=-1"),
        (dict(top_k=2.5), "top_k=2.5"),
        (dict(min_p=-0.1), "min_p=-0.1"),
        (dict(repetition_penalty=0), "repetition_penalty=0"),
        (dict(stop=[""]), "stop="),
        (dict(n=True), "n=True"),
        (dict(max_new_tokens=float("nan")), "max_new_tokens=nan"),
    ],
)
def test_bad_settings(options, message, same):
    stored = Rollouts.from_ids([[7]], [[8]], 0)
    for sampler, prompts in (
        (HFSampler(same.student, same.tokenizer), same.task.test["prompt"][:1]),
        (ReplaySampler(stored, same.tokenizer), [[7]]),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            sampler.sample(prompts, **options)
        assert "\n" not in str(raised.value)


def test_filters_that_leave_one_token_are_greedy(same):
    sampler = HFSampler(same.student, same.tokenizer)
    prompts = same.task.test["prompt"][:4]
    greedy = sampler.sample(prompts, temperature=0, max_new_tokens=20).responses()
    assert sampler.sample(prompts, seed=3, max_new_tokens=20).responses() != greedy
    for narrow in ({"top_k": 1}, {"top_p": 1e-4}, {"min_p": 1.0}):
        assert sampler.sample(prompts, seed=3, max_new_tokens=20, **narrow).responses() == greedy


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_filters_and_penalty_leave_the_recorded_log_probabilities_alone(same, temperature):
    """The penalty counts tokens of the prompt, not its padding, and comes after the recording."""
    encoded = encode_prompts(same.tokenizer, same.task.test["prompt"][:5])
    prompts = [[7] * i + ids for i, ids in enumerate(encoded)]
    sampler = HFSampler(same.student, same.tokenizer)
    options = dict(temperature=temperature, top_p=0.9, top_k=8, min_p=0.01, max_new_tokens=25)
    rollouts = sampler.sample(prompts, repetition_penalty=1.4, seed=5, **options)
    assert rollouts.responses() != sampler.sample(prompts, seed=5, **options).responses()
    expected = response_log_probs(same.student, rollouts)
    torch.testing.assert_close(rollouts.log_probs, expected, atol=1e-5, rtol=1e-5)
    # One by one there is no padding that a penalty could count.
    if temperature == 0:
        alone = [sampler.sample([ids], repetition_penalty=1.4, **options).responses()[0] for ids in prompts]
        assert rollouts.responses() == alone


def test_a_penalty_is_that_of_the_definition(same):
    """Greedy with a penalty, token by token: positive logits of seen tokens divided, negative multiplied."""
    (prompt,) = encode_prompts(same.tokenizer, same.task.test["prompt"][:1])
    ids = list(prompt)
    for _ in range(8):
        with torch.no_grad():
            logits = same.student(torch.tensor([ids])).logits[0, -1]
        seen = torch.tensor(sorted(set(ids)))
        logits[seen] = torch.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
        ids.append(int(logits.argmax()))
    rollouts = HFSampler(same.student, same.tokenizer).sample(
        [prompt], temperature=0, repetition_penalty=1.5, max_new_tokens=8
    )
    assert rollouts.responses() == [ids[len(prompt) :]]


def test_a_response_ends_with_the_first_stop_text(same):
    prompts = same.task.test["prompt"][:6]
    sampler = HFSampler(same.student, same.tokenizer)
    whole = sampler.sample(prompts, temperature=0, max_new_tokens=40).texts(same.tokenizer)
    settings = SamplingSettings(temperature=0, stop=("\n", "zzz"), max_new_tokens=40)
    stopped = sampler.sample(prompts, **settings.keywords())
    texts = stopped.texts(same.tokenizer)
    assert texts == [text[: text.index("\n") + 1] for text in whole]
    assert stopped.truncated(sampler.eos_token_ids).all()
    assert not settings.truncated(stopped, same.tokenizer, sampler.eos_token_ids).any()
    never = SamplingSettings(stop="zzz")
    assert never.truncated(stopped, same.tokenizer, sampler.eos_token_ids).all()


def test_settings_are_handed_on_only_where_they_differ():
    assert SamplingSettings().keywords() == {"temperature": 1.0, "max_new_tokens": 1024}
    settings = SamplingSettings(0.7, top_k=20, stop="###")
    assert SamplingSettings(**settings.keywords()) == settings == SamplingSettings(**settings.stored())
    assert settings.describe() == "temperature 0.7, top_k 20, stop at '###', at most 1,024 tokens"


def test_settings_of_a_model_card(same):
    same.student.generation_config.update(do_sample=True, temperature=0.6, top_p=0.95, top_k=20, min_p=0.0)
    found = SamplingSettings.from_generation_config(same.student, max_new_tokens=9)
    assert found == SamplingSettings(0.6, 0.95, 20, max_new_tokens=9)
    same.student.generation_config.update(do_sample=False, repetition_penalty=1.1, stop_strings=["###"])
    greedy = SamplingSettings.from_generation_config(same.student)
    assert greedy == SamplingSettings(0.0, repetition_penalty=1.1, stop=("###",))


def test_prompts_of_different_lengths_keep_their_order(same):
    """Batches are formed by length, and the answers are in the order of the prompts."""
    encoded = encode_prompts(same.tokenizer, same.task.test["prompt"][:6])
    prompts = [[7] * padding + ids for padding, ids in zip([5, 0, 3, 1, 4, 2], encoded, strict=True)]
    sampler = HFSampler(same.student, same.tokenizer, batch_size=5)
    rollouts = sampler.sample(prompts, n=2, temperature=0, max_new_tokens=30)
    alone = [sampler.sample([ids], temperature=0, max_new_tokens=30) for ids in prompts]
    assert rollouts.prompt_ids() == [ids for ids in prompts for _ in range(2)]
    assert rollouts.responses() == [each.responses()[0] for each in alone for _ in range(2)]
    assert len({tuple(ids) for ids in rollouts.responses()}) > 3
    expected = response_log_probs(same.student, rollouts)
    torch.testing.assert_close(rollouts.log_probs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_off_while_sampling(training):
    """A model in training mode writes what it writes in evaluation mode, and is left in training mode."""
    tokenizer = embedded("same").tokenizer
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=21, n_embd=16, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).train(training)
    sampler = HFSampler(model, tokenizer)
    rollouts = sampler.sample([[4, 7, 9]], n=4, max_new_tokens=12, seed=0)
    assert model.training is training
    expected = response_log_probs(model.eval(), rollouts)
    torch.testing.assert_close(rollouts.log_probs, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [0, 0.5, 1.0])
@pytest.mark.parametrize("n", [1, 3])
def test_recorded_log_probabilities_are_those_of_the_weights(same, temperature, n):
    """Prompts of several lengths (padded), responses that end early or not at all, several batches."""
    encoded = encode_prompts(same.tokenizer, same.task.test["prompt"][:5])
    prompts = [[7] * i + ids for i, ids in enumerate(encoded)]
    sampler = HFSampler(same.student, same.tokenizer, batch_size=4)
    # The greedy responses have 25 or 26 tokens, so that 25 truncates some and lets others end.
    rollouts = sampler.sample(prompts, n=n, temperature=temperature, max_new_tokens=25, seed=5)
    assert 0 < rollouts.truncated(sampler.eos_token_ids).sum() < len(rollouts)
    torch.testing.assert_close(
        rollouts.log_probs, response_log_probs(same.student, rollouts), atol=1e-5, rtol=1e-5
    )
    assert (rollouts.log_probs[rollouts.response_mask] < 0).any()
    assert (rollouts.log_probs[~rollouts.response_mask] == 0).all()


def test_log_probabilities_of_a_student_with_adapters(same):
    student = get_peft_model(
        same.student, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    )
    rollouts = HFSampler(student, same.tokenizer).sample(same.task.test["prompt"][:3], max_new_tokens=9)
    torch.testing.assert_close(
        rollouts.log_probs, response_log_probs(student, rollouts), atol=1e-5, rtol=1e-5
    )


def test_log_probabilities_stand_at_the_token_s_own_column(same):
    """Padded on the right as on the left, and equal to the naive version from all logits."""
    prompts = [[4, 7, 9], [4, 8]]
    responses = [[11, 2], [9, 10, 12]]
    for side in ("left", "right"):
        rollouts = Rollouts.from_ids(prompts, responses, 0, side=side)
        table = response_log_probs(same.student, rollouts, batch_size=1)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            logits = same.student(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            naive = [logits[len(prompt) + j - 1, token] for j, token in enumerate(response)]
            torch.testing.assert_close(
                table[i][rollouts.response_mask[i]], torch.stack(naive).detach(), atol=1e-5, rtol=1e-5
            )
        assert (table[~rollouts.response_mask] == 0).all()


def test_the_gap_is_a_mean_over_response_tokens(same):
    rollouts = Rollouts.from_ids([[4, 7], [4]], [[9], [10, 11, 2]], 0)
    with pytest.raises(ValueError, match="log_probs"):
        logprob_gap(same.student, rollouts)
    log_probs = response_log_probs(same.student, rollouts)
    shifted = torch.where(rollouts.response_mask, log_probs + 0.5, 0.0)
    shifted[0] = log_probs[0]
    assert logprob_gap(same.student, replace(rollouts, log_probs=shifted)) == pytest.approx(0.5 * 3 / 4)
    differences = logprob_differences(same.student, replace(rollouts, log_probs=shifted))
    torch.testing.assert_close(differences, torch.tensor([0.0, 0.5, 0.5, 0.5]), atol=1e-6, rtol=0)


def test_replay_gives_back_stored_log_probabilities(same):
    log_probs = [[-1.0], [-2.0, -3.0]]
    stored = Rollouts.from_ids([[5, 6], [7]], [[8], [10, 11]], 0, log_probs=log_probs)
    replay = ReplaySampler(stored, same.tokenizer)
    again = replay.sample([[7], [5, 6]], max_new_tokens=2)
    assert [row[mask].tolist() for row, mask in zip(again.log_probs, again.response_mask, strict=True)] == [
        [-2.0, -3.0],
        [-1.0],
    ]
    assert replay.sample([[7]], max_new_tokens=1).log_probs.tolist() == [[0.0, -2.0]]
    without = ReplaySampler(replace(stored, log_probs=None), same.tokenizer)
    assert without.sample([[7]]).log_probs is None


def test_replay_returns_stored_responses_in_turn(same):
    stored = Rollouts.from_ids([[5, 6], [5, 6], [7]], [[8], [9], [10, 11]], 0)
    replay = ReplaySampler(stored, same.tokenizer)
    assert replay.sample([[5, 6], [7]], n=3).responses() == [[8], [9], [8], [10, 11], [10, 11], [10, 11]]
    assert replay.sample([[7]], max_new_tokens=1).responses() == [[10]]


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_models_load_and_read(quantize):
    """The wide teacher: bitsandbytes' 4-bit kernel on a CPU wants widths that are multiples of 64."""
    model = load_model("embedded/teacher_wide", quantize=quantize)
    plain = load_model("embedded/teacher_wide")
    ids = torch.arange(5, 15)[None]
    with torch.no_grad():
        close = torch.nn.functional.cosine_similarity(model(ids).logits.float(), plain(ids).logits, dim=-1)
    assert close.min() > 0.8


def test_unknown_quantisation():
    with pytest.raises(ValueError, match="quantize='int3'"):
        load_model("embedded/student", quantize="int3")


@pytest.mark.parametrize(
    "error", [RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError()]
)
def test_batches_are_halved_when_memory_runs_out(same, error, monkeypatch):
    """Every response is the one that a sampler with enough memory writes, also where a batch failed late."""
    prompts = same.task.test["prompt"][:9]
    expected = HFSampler(same.student, same.tokenizer).sample(prompts, n=2, max_new_tokens=30, seed=1)
    sizes = []
    forward = same.student.forward

    def small(*args, **options):
        ids = options.get("input_ids", args[0] if args else None)
        sizes.append(len(ids))
        if len(ids) > 5 and len(sizes) % 7 == 0:
            raise error
        return forward(*args, **options)

    monkeypatch.setattr(same.student, "forward", small)
    written = HFSampler(same.student, same.tokenizer).sample(prompts, n=2, max_new_tokens=30, seed=1)
    assert written.responses() == expected.responses()
    torch.testing.assert_close(written.log_probs, expected.log_probs, atol=1e-5, rtol=1e-5)
    assert set(sizes) >= {18, 9} and max(sizes[-1:]) <= 5


def test_one_response_that_does_not_fit_is_an_error(same, monkeypatch):
    def full(*args, **options):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(same.student, "forward", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        HFSampler(same.student, same.tokenizer).sample(same.task.test["prompt"][:3], max_new_tokens=3)


def test_a_response_depends_on_its_number_and_the_seed_alone(same):
    prompts = same.task.test["prompt"][:6]
    batches = [
        HFSampler(same.student, same.tokenizer, batch_size=size).sample(
            prompts, n=3, max_new_tokens=30, seed=2
        )
        for size in (1, 4, 256)
    ]
    assert batches[0].responses() == batches[1].responses() == batches[2].responses()
    fewer = HFSampler(same.student, same.tokenizer).sample(prompts[:2], n=3, max_new_tokens=30, seed=2)
    assert fewer.responses() == batches[0].responses()[:6]
    assert len({tuple(ids) for ids in batches[0].responses()[:3]}) > 1


def test_batches_fit_into_the_free_memory(same, monkeypatch):
    monkeypatch.setattr(
        "oprd_nb.rollouts.batches.free_memory", lambda device: 50 * bytes_per_token(same.student)
    )
    tried = []
    run_in_batches(tried.append, [10] * 7 + [100], same.student, batch_size=5)
    assert [len(batch) for batch in tried] == [4, 3, 1]


def test_scores_are_halved_too(same, monkeypatch):
    rollouts = HFSampler(same.student, same.tokenizer).sample(same.task.test["prompt"][:8], max_new_tokens=20)

    capture = samplers.capture_each

    def small(model, input_ids, *rest):
        if len(input_ids) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")
        return capture(model, input_ids, *rest)

    monkeypatch.setattr(samplers, "capture_each", small)
    scored = response_log_probs(same.student, rollouts)
    torch.testing.assert_close(scored, rollouts.log_probs, atol=1e-5, rtol=1e-5)


def test_a_copy_in_bfloat16_writes_and_is_refreshed(same):
    """Its log-probabilities are the student's up to rounding, also after a step."""
    sampler = HFSampler(same.student, same.tokenizer, dtype=torch.bfloat16)
    prompts = same.task.test["prompt"][:8]
    written = sampler.sample(prompts, max_new_tokens=30)
    assert 1e-5 < logprob_gap(same.student, written) < 0.1
    with torch.no_grad():
        same.student.lm_head.weight.mul_(0.2)
    assert logprob_gap(same.student, sampler.sample(prompts, max_new_tokens=30)) > 0.1
    sampler.sync(same.student)
    assert logprob_gap(same.student, sampler.sample(prompts, max_new_tokens=30)) < 0.1
    sampler.sync(same.teacher)
    assert logprob_gap(same.teacher, sampler.sample(prompts, max_new_tokens=30)) < 0.1
    assert {p.dtype for p in same.student.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in same.student.parameters())


def test_a_copy_does_not_call_the_wrapped_forward_of_the_original(same):
    """accelerate wraps a forward for mixed precision; a copy that called it would write with the original."""
    original = same.student.forward
    same.student.forward = lambda *args, **options: original(*args, **options)
    sampler = HFSampler(same.student, same.tokenizer, dtype=torch.bfloat16)
    with torch.no_grad():
        same.student.lm_head.weight.zero_()
    written = sampler.sample(same.task.test["prompt"][:2], temperature=0, max_new_tokens=5)
    assert (written.log_probs[written.response_mask] > -1).any(), "the copy kept its head"


def two_ways(monkeypatch, model, tokenizer, ends, **settings):
    """What is written in batches that shrink, and in fixed ones; and how many rows were computed."""
    written, computed = [], []
    monkeypatch.setattr(samplers.HFSampler, "eos_token_ids", ends)
    rows = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for fixed in (False, True):
        if fixed:
            monkeypatch.setattr(writing, "shrinking_cache", lambda model: None)
        rows.clear()
        prompts = [[3, 4, 6, 7], [8, 10], [11, 12, 13], [14]]
        written.append(HFSampler(model, tokenizer).sample(prompts, n=3, max_new_tokens=24, **settings))
        computed.append(sum(rows))
    return written, computed


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma3_text", "phi3", "bloom", "qwen3_5_text", "gemma3n_text"]
)
def test_a_batch_that_shrinks_writes_what_a_fixed_one_writes(family, monkeypatch):
    (shrinking, fixed), computed = two_ways(
        monkeypatch, tiny_model(family), embedded("same").tokenizer, [1, 2, 5, 9]
    )
    assert shrinking.responses() == fixed.responses()
    assert torch.allclose(shrinking.log_probs, fixed.log_probs, atol=1e-4)
    can_shrink = family not in ("qwen3_5_text", "gemma3n_text")
    assert (computed[0] < computed[1]) == can_shrink


def test_a_shrinking_batch_keeps_penalties_temperature_and_stop_texts(monkeypatch):
    pair = embedded("same")
    settings = dict(temperature=1.3, top_p=0.95, repetition_penalty=1.2, stop=("1", "44"))
    (shrinking, fixed), computed = two_ways(monkeypatch, pair.student, pair.tokenizer, [2], **settings)
    assert shrinking.responses() == fixed.responses()
    assert torch.allclose(shrinking.log_probs, fixed.log_probs, atol=1e-5)
    assert computed[0] < computed[1]


ADAPTERS = {
    "all linear layers": {"target_modules": "all-linear"},
    "weight-decomposed": {"target_modules": "all-linear", "use_dora": True},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "a head that is trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def add_noise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.filterwarnings("ignore:Model with `tie_word_embeddings=True`")
def test_a_copy_has_the_adapters_in_its_weights(same, kind, tied):
    """It computes what the student with adapters computes, when it is made and after each refresh."""
    torch.manual_seed(0)
    if tied:
        same.student.config.tie_word_embeddings = True
        same.student.lm_head.weight = same.student.model.embed_tokens.weight
    student = get_peft_model(same.student, LoraConfig(r=4, **ADAPTERS[kind])).eval()
    add_noise(student)
    input_ids = torch.tensor([[3, 4, 6, 7, 9], [8, 10, 11, 12, 13]])
    copied = samplers.copy_in(student, torch.float32)
    assert not any(".lora_" in name for name in copied.state_dict())
    torch.testing.assert_close(copied(input_ids).logits, student(input_ids).logits, atol=3e-5, rtol=1e-5)
    add_noise(student)
    assert (copied(input_ids).logits - student(input_ids).logits).abs().max() > 0.01
    samplers.refresh(copied, student)
    torch.testing.assert_close(copied(input_ids).logits, student(input_ids).logits, atol=3e-5, rtol=1e-5)
    assert all(p.requires_grad for name, p in student.named_parameters() if ".lora_" in name)


def test_what_cannot_be_added_to_weights_has_no_copy(same):
    student = get_peft_model(same.student, PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(
        ValueError, match="PROMPT_TUNING adapters cannot be added to weights; leave dtype away"
    ):
        HFSampler(student, same.tokenizer, dtype=torch.float32)


@pytest.mark.parametrize("adapters", [False, True])
def test_the_head_reads_states_without_gaps(same, adapters):
    """Else torch copies the head's weights once per prompt in bfloat16 on a CPU: 14 GB for 256 prompts."""
    adapted = LoraConfig(target_modules="all-linear")
    student = get_peft_model(same.student, adapted) if adapters else same.student
    seen = []
    same.student.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0].is_contiguous()))
    HFSampler(student, same.tokenizer).sample(same.task.test["prompt"][:3], max_new_tokens=4)
    assert len(seen) == 4 and all(seen)
    assert len(same.student.lm_head._forward_pre_hooks) == 1
