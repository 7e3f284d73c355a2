"""Captured states equal transformers' own on five architectures, in every mode a trainer uses."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_qwen3
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from oprd_nb.capture import (
    FINAL,
    at_least_float32,
    backbone_of,
    capture,
    capture_each,
    forward_hooks,
    lm_head_of,
    long_rope_limit,
    num_layers_of,
    position_ids_of,
)
from oprd_nb.core import Positions, Rollouts

SMALL = dict(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
    eos_token_id=2,
    bos_token_id=1,
)


def build(name):
    torch.manual_seed(0)
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
        "qwen3": lambda: tiny_qwen3(vocab_size=50, layers=4),
        "gemma3": lambda: Gemma3ForCausalLM(
            Gemma3TextConfig(
                **SMALL, head_dim=8, sliding_window=4, layer_types=["sliding_attention", "full_attention"] * 2
            )
        ),
        "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SMALL)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=50,
                n_embd=32,
                n_layer=4,
                n_head=4,
                n_positions=64,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
            )
        ),
    }[name]()


@pytest.fixture(params=["left", "right"])
def rollouts(request):
    return Rollouts.from_ids(
        [[3, 4, 5, 6], [7], [8, 9]],
        [[10, 11, 12, 2], [13, 14, 15, 16, 17, 2], [18]],
        pad_token_id=2,
        side=request.param,
    )


def reference(model, rollouts, rows):
    every = model(
        input_ids=rollouts.input_ids,
        attention_mask=rollouts.attention_mask.long(),
        position_ids=position_ids_of(rollouts.attention_mask),
        output_hidden_states=True,
        use_cache=False,
    ).hidden_states
    return {layer: every[layer][rows] for layer in range(1, len(every))}


@pytest.mark.parametrize("mode", ["no_grad", "grad", "checkpointing", "lora"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "phi3", "gpt2"])
def test_equal_to_output_hidden_states(name, mode, rollouts):
    model = build(name)
    if mode == "lora":
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    if mode == "checkpointing":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    rows = Positions("last:3").mask(rollouts.response_mask)
    with torch.set_grad_enabled(mode != "no_grad"):
        expected = reference(model, rollouts, rows)
        captured = capture(model, rollouts.input_ids, rollouts.attention_mask, rows, layers=[1, 2, 3, 4])
    for layer in (1, 2, 3, 4):
        torch.testing.assert_close(captured[layer], expected[layer], rtol=1e-5, atol=1e-6)
    if mode != "no_grad":
        parameters = [p for p in model.parameters() if p.requires_grad]
        ours = torch.autograd.grad(
            sum(captured[k].pow(2).sum() for k in captured), parameters, allow_unused=True
        )
        theirs = torch.autograd.grad(
            sum(v.pow(2).sum() for v in expected.values()), parameters, allow_unused=True
        )
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_right_and_left_pads_read_as_no_pads():
    """Every sequence alone, without padding, is the truth.

    GPT-2 has absolute positions, where left pads would shift it.
    """
    prompts, responses = [[3, 4, 5, 6], [7], [8, 9]], [[10, 11, 12, 2], [13, 14, 15, 16, 17, 2], [18]]
    for name in ("gpt2", "qwen3"):
        model = build(name).eval()
        alone = torch.cat(
            [_states(model, Rollouts.from_ids([p], [r], 2)) for p, r in zip(prompts, responses, strict=True)]
        )
        for side in ("left", "right"):
            together = _states(model, Rollouts.from_ids(prompts, responses, 2, side=side))
            torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def _states(model, rollouts):
    with torch.no_grad():
        return capture(model, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, [3])[3]


def test_final_norm_is_a_choice(rollouts):
    model = build("llama").eval()
    with torch.no_grad():
        raw = capture(
            model, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, [4], final_norm=False
        )[4]
        normed = capture(model, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, [4])[4]
        both = capture_each(
            model,
            rollouts.input_ids,
            rollouts.attention_mask,
            {4: rollouts.response_mask, FINAL: rollouts.response_mask},
            final_norm=False,
        )
    torch.testing.assert_close(model.model.norm(raw), normed)
    torch.testing.assert_close(both[FINAL], normed)
    torch.testing.assert_close(both[4], raw)


def test_layers_above_the_deepest_do_not_run_and_come_back(rollouts):
    model = build("llama").eval()
    model.model.layers[2].register_forward_hook(
        lambda *_: (_ for _ in ()).throw(AssertionError("layer 3 ran"))
    )
    captured = capture(model, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, [1, 2])
    assert list(captured) == [1, 2] and num_layers_of(model) == 4 and len(model.model.layers) == 4


def test_an_interrupted_pass_leaves_the_model_as_it_was(rollouts):
    model = build("llama").eval()
    handle = model.model.layers[0].register_forward_hook(
        lambda *_: (_ for _ in ()).throw(RuntimeError("interrupted"))
    )
    with pytest.raises(RuntimeError, match="interrupted"):
        capture(model, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, [2])
    handle.remove()
    assert len(model.model.layers) == 4 and not any(block._forward_hooks for block in model.model.layers)


def test_reentrant_checkpointing_is_refused(rollouts):
    model = build("llama").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant"):
        capture(model, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, [2])


@pytest.mark.parametrize("layers", [[0], [5], [], ["last"]])
def test_unknown_layers(layers, rollouts):
    with pytest.raises(ValueError, match="this model has layers 1 to 4"):
        capture(build("llama"), rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, layers)


def test_bad_rows(rollouts):
    model = build("llama")
    with pytest.raises(ValueError, match="a mask of shape"):
        capture(model, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask[:, 1:], [1])
    with pytest.raises(ValueError, match="flat indices"):
        capture(model, rollouts.input_ids, rollouts.attention_mask, torch.tensor([0, 10**6]), [1])
    with pytest.raises(KeyError, match="was not captured"):
        capture(model, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, [1])[2]


def test_repeated_flat_rows_keep_their_order(rollouts):
    model = build("llama").eval()
    rows = torch.tensor([5, 2, 5])
    with torch.no_grad():
        states = capture(model, rollouts.input_ids, rollouts.attention_mask, rows, [1])[1]
    assert (
        states.shape[0] == 3 and torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])
    )


def with_logits_of_its_own(name):
    """A model whose logits are more than its head's product, so much that leaving it out shows."""
    torch.manual_seed(0)
    if name == "soft cap":
        model = Gemma2ForCausalLM(Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5))
    elif name == "divided":
        model = GraniteForCausalLM(GraniteConfig(**SMALL, logits_scaling=4.0))
    else:
        model = CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.25))
    return model.eval()


@pytest.mark.parametrize("name", ["soft cap", "divided", "multiplied"])
def test_logits_are_scaled_and_capped_as_the_family_does(name, rollouts):
    model = with_logits_of_its_own(name)
    every = rollouts.attention_mask
    with torch.no_grad():
        expected = model(
            input_ids=rollouts.input_ids, attention_mask=every.long(), position_ids=position_ids_of(every)
        ).logits[every]
        final = capture(model, rollouts.input_ids, every, every, [FINAL])[FINAL]
        product = torch.nn.functional.linear(final, model.get_output_embeddings().weight)
        torch.testing.assert_close(lm_head_of(model)(final), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(product, expected, rtol=1e-2)


@pytest.mark.parametrize("read", [capture, capture_each])
def test_the_final_norm_is_applied_unless_told_otherwise(read, rollouts):
    model = build("llama").eval()
    last = num_layers_of(model)
    rows = rollouts.response_mask if read is capture else {last: rollouts.response_mask}
    given = [model, rollouts.input_ids, rollouts.attention_mask, rows]
    if read is capture:
        given.append([last])
    with torch.no_grad():
        states = read(*given)[last]
        assert torch.equal(states, read(*given, final_norm=True)[last])
        assert not torch.equal(states, read(*given, final_norm=False)[last])


def test_several_layers_fill_one_buffer_without_resizing_it(rollouts):
    model = build("llama").eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        states = capture(
            model, rollouts.input_ids, rollouts.attention_mask, rollouts.response_mask, [1, 2, FINAL]
        )
    memory = {states[layer].untyped_storage().data_ptr() for layer in (1, 2, FINAL)}
    assert len(memory) == 1


def test_the_backbone_of_nested_models_is_the_one_that_has_the_blocks():
    opt = OPTForCausalLM(
        OPTConfig(
            vocab_size=50,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    )
    assert backbone_of(opt) is opt.model.decoder
    assert num_layers_of(opt) == 2
    llama = build("llama")
    assert backbone_of(llama) is llama.model
    assert backbone_of(get_peft_model(llama, LoraConfig(target_modules="all-linear"))) is llama.model


class Pair(nn.Module):
    """A block that returns its states and something else, as blocks with caches do."""

    def forward(self, states):
        return states + 1, "cache"


@pytest.mark.parametrize("replaces", [False, True])
def test_a_hook_on_a_block_of_several_outputs_replaces_the_states_alone(replaces):
    blocks = nn.ModuleList([Pair()])
    seen = []

    def double(layer, states):
        seen.append(layer)
        return 2 * states if replaces else None

    states = torch.ones(1, 2, 3)
    with forward_hooks(blocks, [1], double):
        found = blocks[0](states)
    assert seen == [1] and found[1] == "cache"
    assert torch.equal(found[0], (4 if replaces else 2) * states)


def test_no_keys_and_values_are_kept(rollouts):
    model = build("llama")
    asked = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: asked.append(kwargs["use_cache"]), with_kwargs=True
    )
    capture_each(model, rollouts.input_ids, rollouts.attention_mask, {2: rollouts.response_mask})
    assert asked == [False]


@pytest.mark.parametrize("inside", [True, False])
def test_the_limit_of_a_long_rope_is_read_where_a_family_keeps_it(inside):
    rope = {"rope_type": "longrope"} | ({"original_max_position_embeddings": 8} if inside else {})
    config = SimpleNamespace(rope_parameters=rope, original_max_position_embeddings=None if inside else 16)
    assert long_rope_limit(config) == (8 if inside else 16)
    config.rope_parameters = rope | {"rope_type": "default"}
    assert long_rope_limit(config) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_precision_is_raised_and_nothing_is_lowered(dtype):
    found = at_least_float32(torch.ones(2, dtype=dtype))
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
