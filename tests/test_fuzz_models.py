"""A seeded corpus of damaged model folders: each is used, or refused in one line that names it.

An eighth runs always, all of it with --slow.
"""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from fuzzing import FOREIGN, Case, check_none, damaged_bytes, flaw
from peft import LoraConfig
from safetensors.torch import load_file, save

from oprd_nb.models.loading import EMBEDDED, load_model

GOOD = EMBEDDED / "student"
TEMPLATES = {
    "empty": ("", True),
    "raises": ("{{ raise_exception('no\nthanks') }}", True),
    "asks what is not there": ("{{ messages[0].a.b.c }}", True),
    "divides by nothing": ("{{ 1 / 0 }}", True),
    "no template": ("{% for %}", True),
    "unclosed": ("{% if true %}", True),
    "leaves its box": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", True),
    "says nothing of the question": ("hello", None),
    "spaces only": ("   ", None),
    "a large range": ("{% for i in range(10 ** 9) %}{% endfor %}{{ messages }}", True),
}


def weights_cases():
    """Weights that do not belong to the configuration."""
    good = load_file(GOOD / "model.safetensors")
    names = sorted(good)
    norm = next(name for name in names if "norm" in name)
    large = max(names, key=lambda name: good[name].numel())
    changed = {
        "one missing": {name: good[name] for name in names if name != large},
        "a norm missing": {name: good[name] for name in names if name != norm},
        "none": {},
        "one too many": good | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)},
        "foreign": {f"h.{index}.weight": torch.zeros(4, 4) for index in range(4)},
        "another shape": good | {large: torch.zeros(3, 3)},
        "transposed": good | {large: good[large].T.contiguous()},
        "a NaN": good | {large: good[large].clone().index_fill_(0, torch.tensor([0]), float("nan"))},
        "an infinity": good | {norm: torch.full_like(good[norm], float("inf"))},
        "whole numbers": {name: (100 * good[name]).to(torch.int32) for name in names},
    }
    for name, tensors in changed.items():
        content = save(tensors, {"format": "pt"})
        refused = None if name == "whole numbers" else True
        yield Case(f"weights: {name}", "model.safetensors", content, refused)


def corpus():
    """Every case, in a fixed order."""
    rng = random.Random(174)
    cases = list(weights_cases())
    for path in sorted(GOOD.iterdir()):
        cases += damaged_bytes(path.name, path.read_bytes(), rng)
        optional = path.name in ("generation_config.json", "tokenizer_config.json", "chat_template.jinja")
        cases.append(Case(f"{path.name}: missing", path.name, None, None if optional else True))
    config = json.loads((GOOD / "config.json").read_text())
    for key in config:
        for value in rng.sample([value for value in FOREIGN if value != "\ud800"], 4):
            text = json.dumps(config | {key: value})
            cases.append(Case(f"config.json: {key} {str(value)[:20]!r}", "config.json", text.encode()))
    for key, value in {
        "num_hidden_layers": 6,
        "hidden_size": 48,
        "vocab_size": 20,
        "num_key_value_heads": 3,
        "model_type": "llama",
        "architectures": ["BertForMaskedLM"],
    }.items():
        refused = None if key == "architectures" else True
        text = json.dumps(config | {key: value})
        cases.append(Case(f"config.json: {key}={value}", "config.json", text.encode(), refused))
    for file in ("generation_config.json", "tokenizer_config.json"):
        entries = json.loads((GOOD / file).read_text())
        for key in entries:
            for value in rng.sample([value for value in FOREIGN if value != "\ud800"], 3):
                text = json.dumps(entries | {key: value})
                cases.append(Case(f"{file}: {key} {str(value)[:20]!r}", file, text.encode()))
    for name, (template, refused) in TEMPLATES.items():
        cases.append(Case(f"template: {name}", "chat_template.jinja", template.encode(), refused))
    other = (EMBEDDED / "teacher_tokens" / "tokenizer.json").read_bytes()
    cases.append(Case("another tokenizer", "tokenizer.json", other, True))
    rng.shuffle(cases)
    return cases


CORPUS = corpus()
SETTINGS = [
    "--task",
    "arithmetic",
    "--limit",
    "1",
    "--samples",
    "1",
    "--max_new_tokens",
    "2",
    "--device",
    "cpu",
]


def check(cases, folder, capsys):
    wrong = []
    model = folder / "model"
    for number, case in enumerate(cases):
        shutil.rmtree(model, ignore_errors=True)
        shutil.copytree(GOOD, model)
        case.write(model)
        found = flaw(
            ["eval", str(model), "--out", str(folder / f"out{number}"), *SETTINGS], capsys, "", case.refused
        )
        if found:
            wrong.append((case.name, found))
    check_none(wrong)


def test_an_eighth_of_the_damaged_models(tmp_path, capsys):
    assert len(CORPUS) >= 200
    check(CORPUS[::8], tmp_path, capsys)


@pytest.mark.slow
def test_all_damaged_models(tmp_path, capsys):
    check(CORPUS, tmp_path, capsys)


def adapter_folder(path: Path) -> Path:
    """Adapters of the embedded student."""
    load_model("embedded/student", lora=LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(path)
    shutil.copy(GOOD / "tokenizer.json", path)
    shutil.copy(GOOD / "tokenizer_config.json", path)
    shutil.copy(GOOD / "chat_template.jinja", path)
    return path


def test_damaged_adapters(tmp_path, capsys):
    good = adapter_folder(tmp_path / "good")
    config = json.loads((good / "adapter_config.json").read_text())
    tensors = load_file(good / "adapter_model.safetensors")
    first = next(iter(tensors))
    folder = tmp_path / "model"
    changes = {
        "itself": {"base_model_name_or_path": str(folder)},
        "a chain": {"base_model_name_or_path": str(good)},
        "nothing": {"base_model_name_or_path": None},
        "nowhere": {"base_model_name_or_path": "runs/nowhere"},
        "another model": {"base_model_name_or_path": "embedded/teacher_wide"},
        "a list": {"base_model_name_or_path": ["a"]},
        "another rank": {"r": 3},
        "rank in words": {"r": "two"},
        "no such kind": {"peft_type": "NOPE"},
        "no such layers": {"target_modules": ["nope"]},
    }
    cases = [
        Case(name, "adapter_config.json", json.dumps(config | change).encode(), True)
        for name, change in changes.items()
    ]
    for name, content in {
        "weights missing": None,
        "weights torn": save(tensors)[:200],
        "weights foreign": save({"a": torch.zeros(2)}),
        "weights of another shape": save(tensors | {first: torch.zeros(3, 3)}),
        "a NaN": save(tensors | {first: torch.full_like(tensors[first], float("nan"))}),
        "one missing": save({name: tensors[name] for name in tensors if name != first}),
    }.items():
        cases.append(Case(name, "adapter_model.safetensors", content, True))
    rng = random.Random(175)
    cases += damaged_bytes("adapter_config.json", (good / "adapter_config.json").read_bytes(), rng)
    wrong = []
    for number, case in enumerate(cases):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(good, folder)
        case.write(folder)
        found = flaw(
            ["eval", str(folder), "--out", str(tmp_path / f"out{number}"), *SETTINGS],
            capsys,
            "",
            case.refused,
        )
        if found:
            wrong.append((case.name, found))
    check_none(wrong)
