"""Families of language models, from tiny configurations: what works on each, and what is refused."""

import json
import random
import sys
import warnings
from pathlib import Path

import pytest
import torch
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig, Phi3Config, Phi3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from check_families import RESULTS, check_family
from families import FAMILIES, SPECIAL, tiny_model

from oprd_nb.capture import FINAL, capture
from oprd_nb.models.checks import check_causal, check_head

ALWAYS = [
    "falcon_h1",
    "gpt2",
    "hyperclovax",
    "llama4_text",
    "modernbert-decoder",
    "qwen2_moe",
    "recurrent_gemma",
    "rwkv",
]
READ_PADDING = ("rwkv", "xlstm")
SOME = sorted({*ALWAYS, *random.Random(0).sample(FAMILIES, 3)})


def check(family: str) -> None:
    """Nothing is silently wrong; what is refused says so for its padding."""
    row = check_family(family)
    assert not [said for said in row.values() if said.startswith("wrong")], row
    if row["load"].startswith("refused"):
        return
    assert row["load"] == row["states"] == row["gradients"] == row["identity"] == "works"
    if family in READ_PADDING:
        assert row["padding"].startswith("refused") and f"{family!r} reads padding as text" in row["steps"]
    else:
        assert row["padding"] == row["steps"] == "works"


@pytest.mark.parametrize("family", SOME)
def test_family(family):
    check(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SOME)))
def test_every_family(family):
    check(family)


def test_the_stored_table_is_of_these_families():
    rows = json.loads(RESULTS.read_text())["rows"]
    assert [row["family"] for row in rows] == FAMILIES and len(rows) >= 60
    assert not [row for row in rows if any(said.startswith("wrong") for said in row.values())]


def test_a_batch_on_both_sides_of_a_long_rope_warns():
    sizes = dict(vocab_size=16, hidden_size=16, intermediate_size=16, num_hidden_layers=2)
    angles = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4, long_factor=[4.0] * 4)
    limits = dict(original_max_position_embeddings=6, max_position_embeddings=24)
    torch.manual_seed(0)
    config = Phi3Config(
        num_attention_heads=2,
        pad_token_id=0,
        initializer_range=0.3,
        rope_parameters=angles,
        **sizes,
        **limits,
    )
    model = Phi3ForCausalLM(config).eval()
    ids = torch.arange(18).view(2, 9) % 15 + 1
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :5] = False
    with pytest.warns(UserWarning, match="positions turn otherwise above 6 tokens"):
        together = capture(model, ids, mask, mask, [FINAL])[FINAL][:4]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = capture(model, ids[:1, 5:], mask[:1, 5:], mask[:1, 5:], [FINAL])[FINAL]
    assert (together - alone).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["xlnet", "gemma3_text"])
def test_a_model_that_reads_later_tokens_is_refused(family, monkeypatch):
    if family == "gemma3_text":
        monkeypatch.setitem(SPECIAL, family, dict(use_bidirectional_attention=True))
    with pytest.raises(ValueError, match=f"{family}.*reads later tokens.*decoder-only"):
        check_causal(tiny_model(family), family)


def test_several_streams_of_hidden_states_are_refused():
    sparsity = dict(layer_types=["sliding_attention", "full_attention"] * 2, num_kv_shared_layers=2)
    per_layer = dict(hidden_size_per_layer_input=8, vocab_size_per_layer_input=64, laurel_rank=4)
    widths = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=8)
    config = Gemma3nTextConfig(
        activation_sparsity_pattern=[0.0] * 4, num_attention_heads=4, num_key_value_heads=2,
        altup_num_inputs=2,
        **sparsity, **per_layer, **widths,
    )  # fmt: skip
    with pytest.raises(ValueError, match="several streams"):
        check_head(Gemma3nForCausalLM(config).eval(), "gemma3n")
