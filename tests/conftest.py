"""Shared fixtures."""

import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model that is not here is refused at once, not after retries

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from oprd_nb.models.pairs import embedded

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that train for minutes")
    parser.addoption("--device", default="emu", help="device of tests/test_emulated.py: emu or cuda")
    parser.addoption("--device_parts", default="", help="its parts, separated by commas; by default all")
    parser.addoption("--browser", action="store_true", help="also run the tests that open a page in chromium")


def pytest_collection_modifyitems(config, items):
    reasons = {"slow": "trains for minutes; run with --slow", "browser": "opens a page; run with --browser"}
    for name, reason in reasons.items():
        if config.getoption(f"--{name}"):
            continue
        for item in items:
            if name in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


def tiny_qwen3(seed=0, vocab_size=40, layers=3, width=32, tie=False):
    """A random Qwen3 small enough to differentiate by hand."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=width // 4,
            tie_word_embeddings=tie,
        )
    ).eval()


@pytest.fixture
def same():
    """The embedded pair of one architecture, fresh for every test."""
    return embedded("same")
