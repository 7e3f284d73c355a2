"""Adapters: the loss of merged weights, the base as teacher, quantised students that learn, save and load."""

import copy
import json

import pytest
import torch
from conftest import tiny_qwen3
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from short_runs import short_run
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3Config, Qwen3ForCausalLM

from oprd_nb.cli import main
from oprd_nb.core import set_seed
from oprd_nb.models.loading import is_adapter_folder, load_model
from oprd_nb.models.pairs import embedded
from oprd_nb.models.placement import quantised_line, unquantised_parts
from oprd_nb.objectives.objective import loss_of
from oprd_nb.objectives.output_space import FullKL, SampledTokenKL, TopKKL
from oprd_nb.objectives.representation import Representation
from oprd_nb.rollouts.samplers import HFSampler, ReplaySampler
from oprd_nb.teachers import Teacher, without_adapters
from oprd_nb.training.trainer import OPRDTrainer

TERMS = [
    Representation(positions="all"),
    Representation("2,4", distance="mse"),
    SampledTokenKL(),
    TopKKL(4),
    FullKL(),
    FullKL("jsd") + 3 * Representation(),
]


def adapted(model, seed=0, trained=True, **options):
    """LoRA on all linear layers; `trained`: with adapters that are not zero."""
    set_seed(seed)
    return get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=not trained, **options)
    )


@pytest.fixture(scope="module")
def rollouts():
    pair = embedded("same")
    return HFSampler(pair.student, pair.tokenizer).sample(pair.task.train["prompt"][:16], max_new_tokens=30)


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_adapters_and_merged_weights_have_the_same_loss(term, rollouts):
    pair = embedded("same")
    teacher = Teacher(pair.teacher, pair.tokenizer)
    student = adapted(pair.student)
    loss, metrics = loss_of(term, student, teacher, rollouts, pair.tokenizer)
    merged_loss, merged_metrics = loss_of(
        term, copy.deepcopy(student).merge_and_unload(), teacher, rollouts, pair.tokenizer
    )
    assert (
        abs(loss - merged_loss) <= 1e-5
        and loss != loss_of(term, embedded("same").student, teacher, rollouts, pair.tokenizer)[0]
    )
    assert all(abs(value - merged_metrics[name]) <= 1e-5 for name, value in metrics.items())


@pytest.mark.parametrize("term", TERMS, ids=repr)
def test_adapters_of_zero_have_no_loss_against_the_base(term, rollouts):
    pair = embedded("same")
    student = adapted(pair.student, trained=False)
    loss, _ = loss_of(term, student, Teacher.of_base(student, pair.tokenizer), rollouts, pair.tokenizer)
    assert abs(loss) <= 1e-6
    moved = adapted(embedded("same").student)
    assert loss_of(term, moved, Teacher.of_base(moved, pair.tokenizer), rollouts, pair.tokenizer)[
        0
    ] > 1e-3 or isinstance(term, SampledTokenKL)


def test_the_base_as_teacher_is_the_base_loaded_apart(rollouts):
    pair = embedded("same")
    student = adapted(pair.student)
    base = embedded("same").student
    for term in TERMS:
        shared = loss_of(term, student, Teacher.of_base(student, pair.tokenizer), rollouts, pair.tokenizer)[0]
        assert shared == loss_of(term, student, Teacher(base, pair.tokenizer), rollouts, pair.tokenizer)[0]


def test_the_adapters_come_back_whatever_happens():
    student = adapted(tiny_qwen3()).train()
    trained = [p.requires_grad for p in student.parameters()]
    on = student.eval()(torch.arange(9)[None]).logits
    student.train()
    with pytest.raises(KeyError), without_adapters(student):
        assert not student.training
        raise KeyError
    assert student.training and [p.requires_grad for p in student.parameters()] == trained
    assert torch.equal(student.eval()(torch.arange(9)[None]).logits, on)
    with pytest.raises(ValueError, match="no adapters to switch off"), without_adapters(tiny_qwen3()):
        pass


def test_modules_trained_whole_are_switched_off_as_well():
    base = tiny_qwen3()
    student = adapted(copy.deepcopy(base), modules_to_save=["embed_tokens"])
    with torch.no_grad():
        student.get_input_embeddings().weight.add_(1.0)
    ids = torch.arange(9)[None]
    with without_adapters(student):
        assert torch.equal(student(ids).logits, base(ids).logits)


def trained(folder, student, teacher, tokenizer, prompts, term, sampler=None, **changes):
    settings = dict(learning_rate=2e-2, max_completion_length=30, weight_decay=0.5)
    peft_config = changes.pop("peft_config", None)
    trainer = OPRDTrainer(
        model=student,
        teacher=teacher,
        objective=term,
        args=short_run(folder, **(settings | changes)),
        train_dataset=prompts,
        processing_class=tokenizer,
        sampler=sampler,
        peft_config=peft_config,
    )
    trainer.train()
    return trainer, [
        line
        for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        if "loss" in line
    ]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("inside", [False, True], ids=["wrapped before", "wrapped by the trainer"])
def test_a_run_against_its_own_base_moves_adapters_only(inside, checkpointing, same, tmp_path):
    before = {name: p.clone() for name, p in same.student.named_parameters()}
    student = same.student if inside else adapted(same.student, lora_alpha=2)
    config = (
        LoraConfig(r=4, lora_alpha=2, target_modules="all-linear", init_lora_weights=False)
        if inside
        else None
    )
    trainer, lines = trained(
        tmp_path,
        student,
        Teacher.of_base(student, same.tokenizer),
        same.tokenizer,
        same.task.train,
        FullKL() + Representation("2"),
        peft_config=config,
        gradient_checkpointing=checkpointing,
        max_steps=16,
        learning_rate=1e-2,
    )
    assert (
        lines[0]["loss"] > 1e-3 and lines[-1]["loss"] < lines[0]["loss"]
    )  # adapters drawn at random are pulled back to the base
    names = {
        name.replace(".base_layer", "").removeprefix("base_model.model."): p
        for name, p in trainer.model.named_parameters()
    }
    assert all(names[name].equal(p) for name, p in before.items())
    assert trainer.teacher_model is None


def test_weights_shared_by_accident_are_refused(same, tmp_path):
    with pytest.raises(ValueError, match="teacher: shares weights with the student"):
        trained(
            tmp_path / "a",
            same.student,
            Teacher(same.student, same.tokenizer),
            same.tokenizer,
            same.task.train,
            FullKL(),
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
    other = embedded("same").student
    with pytest.raises(ValueError, match="was given another model than the student"):
        trained(
            tmp_path / "b",
            adapted(embedded("same").student),
            Teacher.of_base(adapted(other), same.tokenizer),
            same.tokenizer,
            same.task.train,
            FullKL(),
        )
    assert not any(tmp_path.iterdir())


def test_adapters_drawn_by_the_trainer_depend_on_its_seed_alone(tmp_path):
    drawn = []
    for noise in (1, 2):
        pair = embedded("same")
        torch.manual_seed(noise)
        trainer, _ = trained(
            tmp_path / str(noise),
            pair.student,
            Teacher(pair.teacher, pair.tokenizer),
            pair.tokenizer,
            pair.task.train,
            FullKL(),
            max_steps=1,
            peft_config=LoraConfig(r=4, target_modules="all-linear"),
        )
        drawn.append({name: p.detach() for name, p in trainer.model.named_parameters() if "lora_" in name})
    assert all(drawn[1][name].equal(p) for name, p in drawn[0].items())


@pytest.fixture
def quantisable(tmp_path):
    """A folder with a tiny Qwen3 whose widths bitsandbytes accepts on a CPU."""
    vocabulary = len(embedded("same").tokenizer)
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=16,
        )
    )
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_a_quantised_student_learns_saves_and_loads(quantize, quantisable, rollouts, tmp_path):
    """Thirty steps on stored rollouts halve the loss; saved adapters on a new base give the same logits."""
    tokenizer = embedded("same").tokenizer
    set_ = embedded("same").task.train.select(range(16))
    teacher = load_model(quantisable, dtype=torch.float32)
    with torch.no_grad():
        for p in teacher.parameters():
            p.add_(
                0.3 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
                if p.ndim > 1
                else 0
            )
    student = load_model(
        quantisable,
        lora=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        quantize=quantize,
        dtype=torch.float32,
    )
    stored = {name: p.clone() for name, p in student.named_parameters() if "lora_" not in name}
    trainer, lines = trained(
        tmp_path / "run",
        student,
        Teacher(teacher, tokenizer),
        tokenizer,
        Dataset.from_list(list(set_)),
        Representation(positions="all"),
        ReplaySampler(rollouts, tokenizer),
        logprob_tolerance=float("inf"),
        max_steps=30,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=30,
    )
    assert lines[-1]["loss"] < lines[0]["loss"] / 2, [round(line["loss"], 4) for line in lines[::5]]
    assert all(p.equal(stored[name]) for name, p in student.named_parameters() if "lora_" not in name)
    checkpoint = tmp_path / "run" / "checkpoint-30"
    again = load_model(checkpoint, quantize=quantize, dtype=torch.float32)
    ids = rollouts.input_ids[:4]
    with torch.no_grad():
        assert is_adapter_folder(checkpoint) and torch.equal(
            trainer.model.eval()(ids).logits, again(ids).logits
        )


def test_an_adapter_folder_is_not_wrapped_again(same, tmp_path):
    adapted(same.student).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has adapters already"):
        load_model(tmp_path, lora=LoraConfig(r=2))
    assert {name for name, p in load_model(tmp_path).named_parameters() if p.requires_grad} == {
        name for name, p in adapted(embedded("same").student).named_parameters() if p.requires_grad
    }


# What quantising leaves out


def test_experts_that_share_a_tensor_stay_unquantised_and_that_is_said(tmp_path):
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    whole = AutoModelForCausalLM.from_config(config)
    whole.save_pretrained(tmp_path)
    sizes = {name: parameter.numel() for name, parameter in whole.named_parameters()}
    experts = sum(size for name, size in sizes.items() if ".experts." in name)
    attention = sum(size for name, size in sizes.items() if "_proj.weight" in name)
    for quantize in ("nf4", "int8"):
        model = load_model(tmp_path, LoraConfig(r=2, target_modules=["q_proj"]), quantize=quantize)
        counts = unquantised_parts(model)
        assert sum(counts.values()) == sum(sizes.values())
        assert counts["experts"] == experts
        assert counts["quantised"] == attention
        assert counts["embeddings and head"] == 2 * 64 * 64
        line = quantised_line("student", model)
        assert line.startswith(f"student: {1 - attention / sum(sizes.values()):.1%} of its parameters stay")
        assert "no experts that share one tensor" in line
    assert quantised_line("student", whole) is None


def test_a_run_says_what_stays_unquantised_on_both_sides(tmp_path, capsys):
    words = (
        "train embedded/student embedded/teacher arithmetic --lora 4 --quantize nf4 --teacher_quantize int8"
    )
    assert main([*words.split(), "--dtype", "bfloat16", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for side in ("student", "teacher"):
        assert sum(line.startswith(f"{side}: ") and "stay unquantised" in line for line in lines) == 1


def test_4_bits_write_where_rows_are_no_whole_blocks():
    model = load_model("embedded/student", quantize="nf4", dtype="bfloat16")
    assert model.config.hidden_size % 64
    pair = embedded("same")
    sampler = HFSampler(model, pair.tokenizer)
    assert len(sampler.sample(pair.task.test["prompt"][:2], max_new_tokens=3)) == 2
