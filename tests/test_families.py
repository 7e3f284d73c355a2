"""Families of language models, from tiny configurations: what works on each, and what is refused."""

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from check_families import RESULTS, check_family
from families import FAMILIES

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
SOME = sorted({*ALWAYS, *random.Random(0).sample(FAMILIES, 3)})


def check(family: str) -> None:
    """Nothing is silently wrong; what is refused says so for its padding."""
    row = check_family(family)
    assert not [said for said in row.values() if said.startswith("wrong")], row
    assert row["states"] == row["gradients"] == row["identity"] == "works"
    if family != "rwkv":
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


def test_padding_that_is_read_as_text_is_refused():
    row = check_family("rwkv")
    assert row["padding"].startswith("refused") and "'rwkv' reads padding as text" in row["steps"]
