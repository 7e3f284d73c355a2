"""Tiny random models of the families of decoder-only language models, from configurations alone."""

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

LAYERS = 4
VOCABULARY = 64


def sizes() -> dict[str, Any]:
    """Small sizes under all the names that configurations have for them."""
    named = [
        (VOCABULARY, "vocab_size"),
        (32, "hidden_size n_embd d_model n_embed dim embedding_size word_embed_proj_dim embed_dim"),
        (48, "intermediate_size ffn_dim n_inner d_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim"),
        (24, "moe_intermediate_size shared_expert_intermediate_size"),
        (LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers"),
        (
            4,
            "num_attention_heads n_head n_heads num_heads decoder_attention_heads attention_heads "
            "num_experts num_local_experts n_routed_experts moe_num_experts conv_kernel time_step_rank "
            "qk_rope_head_dim qk_nope_head_dim linear_num_value_heads mamba_n_heads",
        ),
        (
            2,
            "num_key_value_heads num_experts_per_tok moe_k linear_num_key_heads mamba_expand expand "
            "eos_token_id",
        ),
        (
            8,
            "head_dim v_head_dim qk_head_dim state_size sliding_window linear_key_head_dim "
            "linear_value_head_dim mamba_d_state chunk_size mamba_chunk_size",
        ),
        (128, "max_position_embeddings n_positions n_ctx max_seq_len"),
        (1, "n_group topk_group first_k_dense_replace bos_token_id mamba_n_groups n_groups"),
        (16, "q_lora_rank kv_lora_rank mamba_d_head"),
        (64, "mamba_d_ssm"),
        (0, "pad_token_id"),
        (
            0.0,
            "attention_dropout hidden_dropout resid_pdrop embd_pdrop attn_pdrop dropout hidden_dropout_prob "
            "attention_probs_dropout_prob activation_dropout layerdrop residual_dropout",
        ),
        # Wide enough for scales and soft caps to show.
        (0.2, "initializer_range init_std"),
    ]
    return {name: value for value, names in named for name in names.split()}


ALTERNATING = ["mamba", "hybrid"] * (LAYERS // 2)
SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": dict(num_key_value_heads=4, layer_types=["linear_attention", "full_attention"] * 2),
    "bamba": dict(attn_layer_indices=[1, 3]),
    "codegen": dict(rotary_dim=4),
    "cohere": dict(logit_scale=0.5),
    "cohere2": dict(logit_scale=0.5),
    "dbrx": dict(
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "deepseek_v2": dict(head_dim=4, num_key_value_heads=4),
    "deepseek_v3": dict(head_dim=4, num_key_value_heads=4),
    "dots1": dict(n_shared_experts=1),
    "falcon_h1": dict(lm_head_multiplier=0.5),
    "gemma2": dict(final_logit_softcapping=0.5),
    "gemma3n_text": dict(
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, activation_sparsity_pattern=[0.0] * LAYERS,
        laurel_rank=4, altup_num_inputs=2,
    ),
    "gemma4_text": dict(
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, global_head_dim=8
    ),
    "glm4_moe_lite": dict(num_key_value_heads=4),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]]),
    "gptj": dict(rotary_dim=4),
    "granite": dict(logits_scaling=3.0),
    "granitemoehybrid": dict(layer_types=["mamba", "attention"] * 2, logits_scaling=3.0),
    "hyperclovax": dict(logits_scaling=3.0),
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
        use_mamba_kernels=False,
    ),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_dense_layers=1),
    "mamba2": dict(num_heads=4, head_dim=16),
    "nanochat": dict(final_logit_softcapping=0.5),
    "recurrent_gemma": dict(
        logits_soft_cap=0.5, block_types=["recurrent", "attention"], attention_window_size=8
    ),
    "xlstm": dict(hidden_size=64, qk_dim_factor=1.0),
    "youtu": dict(num_key_value_heads=4),
    "zamba": dict(
        attn_layer_period=2, attn_layer_offset=1, attention_hidden_size=64, attention_head_dim=16,
        num_key_value_heads=4, layers_block_type=ALTERNATING, use_mamba_kernels=False,
    ),
    "zamba2": dict(
        layers_block_type=ALTERNATING, layer_types=ALTERNATING, num_key_value_heads=4, use_mem_rope=False
    ),
}  # fmt: skip
"""What a family needs besides, and scales and caps that its default configuration switches off."""

FAMILIES = (
    "afmoe apertus arcee aria_text bailing_hybrid bamba bart bert biogpt bitnet bloom codegen cohere "
    "cohere2 cohere2_moe ctrl cwm dbrx deepseek_v2 deepseek_v3 diffllama doge dots1 ernie4_5 ernie4_5_moe "
    "exaone4 exaone_moe falcon falcon_h1 falcon_mamba flex_olmo gemma gemma2 gemma3_text gemma3n_text "
    "gemma4_text gemma4_unified_text glm glm4 glm4_moe glm4_moe_lite gpt2 gpt_bigcode gpt_neo gpt_neox "
    "gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa granitemoehybrid "
    "granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax inkling_text "
    "internlm3 iquestcoder jais2 jamba jetmoe laguna lfm2 lfm2_moe lfm3 llama llama4_text "
    "mamba mamba2 mellum mimo_v2_flash minimax minimax_m2 ministral ministral3 mistral mixtral "
    "modernbert-decoder mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt "
    "opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe "
    "qwen3_next recurrent_gemma roberta rwkv seed_oss smollm3 solar_open stablelm starcoder2 t5 "
    "vaultgemma xglm xlnet xlstm youtu zamba zamba2"
).split()


def tiny_config(family: str) -> PretrainedConfig:
    """A small configuration of a family."""
    cls = CONFIG_MAPPING[family]
    names = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "__dataclass_fields__", {}))
    aliases = cls.attribute_map
    wanted = sizes() | SPECIAL.get(family, {})
    known = {name: value for name, value in wanted.items() if name in names | set(aliases)}
    return cls(**{name: value for name, value in known.items() if aliases.get(name) not in known})


def tiny_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A small random model of a family, in float32 and evaluation mode."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(tiny_config(family)).float().eval()
