"""Families of language models: hidden states and logits are the model's own, from tiny configurations."""

import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from families import FAMILIES, LAYERS, tiny_model

from oprd_nb.capture import FINAL, capture, lm_head_of, num_layers_of
from oprd_nb.models.checks import check_head

ALWAYS = [
    "falcon_h1",
    "hyperclovax",
    "recurrent_gemma",
    "llama4_text",
    "modernbert-decoder",
    "mpt",
    "granite",
]
SOME = sorted({*ALWAYS, *random.Random(0).sample(FAMILIES, 6)})


def check_capture_and_head(family: str) -> None:
    """The head's logits of captured final states are the model's, and every layer can be captured."""
    model = tiny_model(family)
    assert num_layers_of(model) == LAYERS
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids, dtype=torch.bool)
    with torch.no_grad():
        expected = model(ids).logits.flatten(0, 1)
        captured = capture(model, ids, mask, mask, [*range(1, LAYERS + 1), FINAL])
        torch.testing.assert_close(lm_head_of(model)(captured[FINAL]), expected, atol=1e-4, rtol=1e-4)
    assert expected.abs().max() > 1e-3
    assert all(len(captured[layer]) == ids.numel() for layer in range(1, LAYERS + 1))
    check_head(model, family)


@pytest.mark.parametrize("family", SOME)
def test_capture_and_head(family):
    check_capture_and_head(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(SOME)))
def test_capture_and_head_of_every_family(family):
    check_capture_and_head(family)
