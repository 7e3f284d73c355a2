"""Models that are not what they say, families with heads of their own, placement and precision."""

import json
import socket
import time

import pytest
import torch
from conftest import tiny_qwen3
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import T5Config

from oprd_nb.capture import FINAL, capture, lm_head_of
from oprd_nb.models.checks import check_head, not_finite
from oprd_nb.models.loading import chosen_device, input_device, load_model, load_tokenizer
from oprd_nb.models.placement import placement_line
from oprd_nb.models.tokenizers import check_tokenizer
from oprd_nb.utils import autocast_dtype, best_device


@pytest.fixture
def folder(tmp_path):
    tiny_qwen3().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(path, **options) -> str:
    """The one line with which a model is refused."""
    with pytest.raises(ValueError) as caught:
        load_model(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# What is not a model


@pytest.mark.parametrize("layers, flaw", [(4, "are missing"), (2, "are not used")])
def test_a_configuration_of_another_depth_is_refused(folder, layers, flaw):
    change_config(folder, num_hidden_layers=layers, layer_types=["full_attention"] * layers)
    message = refusal(folder)
    assert flaw in message and "layers." in message


def test_a_configuration_of_another_width_is_refused(folder):
    change_config(folder, intermediate_size=48)
    assert "model" in refusal(folder)


def test_a_missing_tensor_is_named(folder):
    change_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    assert "model.layers.1.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_named(folder, value):
    change_weights(
        folder, lambda weights: weights["model.layers.2.mlp.down_proj.weight"].view(-1)[7:8].fill_(value)
    )
    assert "model.layers.2.mlp.down_proj.weight" in refusal(folder)


def test_large_finite_weights_in_half_precision_are_no_infinity():
    model = torch.nn.Linear(1000, 2, bias=False, dtype=torch.float16)
    torch.nn.init.constant_(model.weight, 1000.0)
    assert not_finite(model) == []
    with torch.no_grad():
        model.weight[0, 0], model.weight[0, 1] = torch.inf, -torch.inf
    assert not_finite(model) == ["weight"]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("content", ["half", "empty", "foreign"])
def test_a_damaged_file_is_refused_in_one_line(folder, name, content):
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(
        {"half": whole[: len(whole) // 2], "empty": b"", "foreign": b"[1, 2]" * 40}[content]
    )
    assert "model=" in refusal(folder)


@pytest.mark.parametrize(
    "change", [{"model_type": "nobody"}, {"hidden_size": "wide"}, {"num_attention_heads": 0}]
)
def test_a_configuration_that_means_nothing_is_refused(folder, change):
    change_config(folder, **change)
    assert "model=" in refusal(folder)


def test_encoder_decoders_are_refused(tmp_path):
    T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8).save_pretrained(tmp_path)
    assert "decoder" in refusal(tmp_path)


@pytest.mark.parametrize("base", ["itself", "", "no/such/folder/at-all"])
def test_adapters_without_a_base_are_refused(folder, tmp_path, base):
    out = tmp_path / "adapters"
    get_peft_model(tiny_qwen3(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(out)
    config = json.loads((out / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(out) if base == "itself" else base
    (out / "adapter_config.json").write_text(json.dumps(config))
    assert "model=" in refusal(out)


def test_an_unknown_hub_id_without_a_network_is_refused_soon(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def unreachable(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    for load in (load_model, load_tokenizer):
        start = time.perf_counter()
        with pytest.raises(ValueError, match="nobody/none.*give a model folder"):
            load("nobody/none")
        assert time.perf_counter() - start < 10


@pytest.mark.parametrize("path", ["./no-such-folder", "/no/such/folder", "a/b/c"])
def test_a_path_that_is_not_there_is_never_looked_up(monkeypatch, path):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert "there is no such folder" in refusal(path)


# Tokenizers


def test_one_special_token_without_an_embedding_is_gemmas_own():
    tokenizer = load_tokenizer("embedded/student")
    model = tiny_qwen3(vocab_size=len(tokenizer))
    check_tokenizer(model, tokenizer, "student")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    check_tokenizer(model, tokenizer, "student")
    tokenizer.add_tokens(["ordinary"])
    with pytest.raises(ValueError, match="'ordinary'.*student's own tokenizer"):
        check_tokenizer(model, tokenizer, "student")


def test_an_end_token_without_an_embedding_is_refused():
    tokenizer = load_tokenizer("embedded/student")
    model = tiny_qwen3(vocab_size=len(tokenizer))
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(ValueError, match="own tokenizer"):
        check_tokenizer(model, tokenizer, "teacher")


# Heads


def test_adapters_on_the_head_reach_the_logits():
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_qwen3(), config).eval()
    ids = torch.arange(3, 15).view(2, 6)
    mask = torch.ones_like(ids).bool()
    hidden = capture(model, ids, mask, mask, [FINAL])[FINAL]
    torch.testing.assert_close(lm_head_of(model)(hidden).view(2, 6, -1), model(ids).logits)
    check_head(model, "adapted")


# Placement and precision


def test_devices():
    assert chosen_device("cpu") == torch.device("cpu")
    assert chosen_device() == best_device()
    assert autocast_dtype("cpu") is None
    for device in ("foo", "cuda:99", "cuda:-1"):
        with pytest.raises(ValueError, match="device="):
            chosen_device(device)


def test_dtype_is_checked(folder):
    assert "dtype='foo'" in refusal(folder, dtype="foo")
    assert "dtype='int8'" in refusal(folder, dtype="int8")


def test_what_is_trained_is_float32(tmp_path):
    tiny_qwen3(tie=True).to(torch.bfloat16).save_pretrained(tmp_path)
    student = load_model(tmp_path, train=True)
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert input_device(student).type == "cpu"
    adapted = load_model(tmp_path, lora=LoraConfig(r=2, target_modules="all-linear"), train=True)
    assert {(p.requires_grad, p.dtype) for p in adapted.parameters()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }
    assert "trained" in placement_line({"student": adapted}, trained="student", tokens=16)
    assert load_model(tmp_path).dtype == torch.bfloat16


def test_quantised_weights_are_not_trained(folder):
    assert "give lora" in refusal(folder, quantize="nf4", train=True)
