"""What is exported is a plain model folder with the student's own answers, or nothing at all."""

import json
import shutil

import pandas as pd
import pytest
import torch
from peft import LoraConfig, get_peft_model
from short_runs import short_run
from transformers import AutoModelForCausalLM, AutoTokenizer

from oprd_nb.core import set_seed
from oprd_nb.models.loading import EMBEDDED, is_adapter_folder, load_model
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives.output_space import FullKL
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.runs import add_to_summary, read_run, synthetic_run
from oprd_nb.teachers import Teacher
from oprd_nb.training.card import model_card
from oprd_nb.training.checkpoints import checkpoints_of, write_manifest
from oprd_nb.training.export import checkpoint_of, export_model, merged, model_folder, run_of
from oprd_nb.training.trainer import OPRDTrainer


def adapted(model, seed=0):
    set_seed(seed)
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=1, target_modules="all-linear", init_lora_weights=False)
    ).eval()


def greedy(model, tokenizer, prompts):
    return HFSampler(model, tokenizer).sample(prompts, temperature=0, max_new_tokens=40).responses()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_run_folder_becomes_a_model_with_the_same_answers(kind, same, tmp_path):
    args = short_run(tmp_path / "run", learning_rate=3e-3, save_strategy="steps", save_steps=3)
    trainer = OPRDTrainer(
        model=same.student,
        teacher=Teacher(same.teacher, same.tokenizer),
        objective=FullKL(),
        args=args,
        train_dataset=same.task.train,
        processing_class=same.tokenizer,
        peft_config=LoraConfig(r=8, target_modules="all-linear") if kind == "lora" else None,
    )
    trainer.train()
    out = export_model(tmp_path / "run", tmp_path / "plain")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(out),
        AutoTokenizer.from_pretrained(out, padding_side="left"),
    )
    prompts = same.task.test["prompt"][:32]
    answers = greedy(trainer.model, same.tokenizer, prompts)
    assert (
        greedy(model, tokenizer, prompts)
        == answers
        != greedy(embedded("same").student, same.tokenizer, prompts)
    )
    assert (
        tokenizer.chat_template == same.tokenizer.chat_template
        and model.generation_config.eos_token_id == embedded("same").student.generation_config.eos_token_id
    )
    assert {p.name for p in out.iterdir()} == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain", "run"]


def test_merging_leaves_the_model_in_memory_as_it_was(same):
    student, ids = adapted(same.student), torch.arange(12)[None]
    before = {name: p.clone() for name, p in student.named_parameters()}
    whole = merged(student)
    assert all(p.equal(before[name]) for name, p in student.named_parameters()) and merged(whole) is whole
    torch.testing.assert_close(whole(ids).logits, student(ids).logits, rtol=0, atol=1e-4)


def test_adapters_can_stay_adapters(same, tmp_path):
    student = adapted(same.student)
    out = export_model(student, tmp_path / "adapters", merge=False, tokenizer=same.tokenizer)
    assert is_adapter_folder(out) and (out / "chat_template.jinja").exists()
    assert torch.equal(load_model(out)(torch.arange(9)[None]).logits, student(torch.arange(9)[None]).logits)


def test_adapters_of_a_quantised_student_go_into_the_unquantised_base(tmp_path):
    wide = embedded("cross_architecture")
    student = load_model(
        "embedded/teacher_wide",
        lora=LoraConfig(r=4, lora_alpha=1, target_modules="all-linear", init_lora_weights=False),
        quantize="nf4",
    )
    with pytest.raises(ValueError, match="weights are quantised"):
        export_model(student, tmp_path / "no", tokenizer=wide.teacher_tokenizer)
    student.save_pretrained(tmp_path / "adapters")
    wide.teacher_tokenizer.save_pretrained(tmp_path / "adapters")
    out = export_model(tmp_path / "adapters", tmp_path / "plain")
    ids = torch.arange(9)[None]
    wanted = load_model(tmp_path / "adapters")(ids).logits
    torch.testing.assert_close(
        AutoModelForCausalLM.from_pretrained(out)(ids).logits, wanted, rtol=0, atol=1e-4
    )
    assert not (tmp_path / "no").exists()


def run_with(folder, best=None, steps=(1, 2)):
    for step in steps:
        shutil.copytree(EMBEDDED / "student", folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(
            json.dumps({"best_model_checkpoint": best})
        )
        write_manifest(folder / f"checkpoint-{step}")
    return folder


def test_the_best_checkpoint_is_meant_where_one_was_chosen(tmp_path):
    assert checkpoint_of(run_with(tmp_path / "a")).name == "checkpoint-2"
    run = run_with(tmp_path / "b", best="/elsewhere/checkpoint-1")
    assert checkpoint_of(run).name == "checkpoint-1" and model_folder(run / "checkpoint-2") == str(
        run / "checkpoint-2"
    )
    (run / "checkpoint-1" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="best checkpoint checkpoint-1 is not complete"):
        checkpoint_of(run)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: (folder / "checkpoint-1").mkdir(parents=True), "without a complete checkpoint"),
        (lambda folder: folder.mkdir(), "cannot be loaded"),
        (lambda folder: None, "there is no such folder"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*not used")
def test_a_source_that_cannot_be_used_leaves_nothing(make, message, tmp_path):
    make(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        export_model(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.part").exists()


def test_a_torn_checkpoint_is_not_exported(tmp_path):
    run = run_with(tmp_path / "run")
    weights = run / "checkpoint-2" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors has"):
        export_model(run / "checkpoint-2", tmp_path / "out")
    with pytest.warns(UserWarning, match="checkpoint-2: not used"):
        assert checkpoint_of(run) == checkpoints_of(run)[0]


def test_what_is_there_is_never_overwritten(same, tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "model.safetensors").write_text("in use")
    with pytest.raises(ValueError, match="exists already"):
        export_model("embedded/student", tmp_path / "served")
    with pytest.raises(ValueError, match="comes without its tokenizer"):
        export_model(same.student, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    assert (export_model("embedded/student", tmp_path / "empty") / "config.json").exists()

    def full(*args, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(type(same.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="no space"):
        export_model("embedded/student", tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "served"]


def test_the_card_names_student_teacher_objective_numbers_kit_and_paper(tmp_path):
    folder = synthetic_run(tmp_path / "run", steps=3, problems=4)
    metrics = pd.DataFrame({"metric": ["avg@4"], "value": [0.875], "low": [0.8], "high": [1.0]})
    add_to_summary(folder, "after", metrics)
    card = model_card(read_run(folder))
    for part in ("embedded/student", "embedded/teacher", "arithmetic", "oprd_nb", "arXiv:2606.06021"):
        assert part in card
    assert "| after training | Avg@4 | 87.5 | 80.0–100.0 |" in card
    assert "None" not in card
    assert run_of(folder / "checkpoint-3") == folder
    assert run_of("embedded/student") is None
