"""What is looked at before the first step: each when it is wrong, and when it is not."""

import json

import pytest
import torch
from conftest import tiny_qwen3
from datasets import Dataset

from oprd_nb.cli import main
from oprd_nb.models import load_model, load_tokenizer
from oprd_nb.models.pairs import embedded
from oprd_nb.rollouts.prompts import PromptFormat
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.teachers import Teacher
from oprd_nb.training import OPRDConfig
from oprd_nb.training.startup import (
    check_card,
    check_context,
    check_dropout,
    check_ends,
    check_memory,
    check_sampler,
    check_teacher,
    check_vocabularies_at_start,
    findings_at_start,
    turn_end,
    with_answers,
)

SHORT = "--max_steps 1 --max_completion_length 8 --per_device_train_batch_size 2 --use_cpu true"
SHORT += " --save_strategy no --gradient_accumulation_steps 1 --disable_tqdm true --num_generations 1"


def settings(**changes):
    return OPRDConfig("unused", **{"max_completion_length": 40, "use_cpu": True, "bf16": False} | changes)


def instruct_teacher(pair):
    """A teacher whose template ends turns with another token, though its list holds the student's as well."""
    tokenizer = pair.teacher_tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|assistant|>")
    ids = [pair.tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|assistant|>")]
    pair.teacher.generation_config.eos_token_id = ids
    return Teacher(pair.teacher, tokenizer)


def test_a_base_student_beside_an_instruct_teacher_whose_list_has_both_ends(same):
    teacher = instruct_teacher(same)
    found = check_ends(same.student, same.tokenizer, teacher)
    assert not found.fine and "<|assistant|>" in found.text and "eos_token_id" in found.text
    same.student.generation_config.eos_token_id = [1, turn_end(teacher.tokenizer)]
    assert check_ends(same.student, same.tokenizer, teacher).fine


def test_the_end_of_a_turn_is_what_the_template_writes(same):
    tokenizer = same.tokenizer
    assert turn_end(tokenizer) == tokenizer.convert_tokens_to_ids("<|end|>")
    late = "{% for m in messages %}{{ m.content }}\n<|assistant|>{% endfor %}"
    assert turn_end(tokenizer, PromptFormat(template=late)) == tokenizer.convert_tokens_to_ids(
        "<|assistant|>"
    )
    assert turn_end(tokenizer, PromptFormat(template="{{ raise_exception('no') }}")) is None
    tokenizer.chat_template = None
    assert turn_end(tokenizer) == tokenizer.eos_token_id


def test_models_with_different_tokenizers_are_not_compared():
    pair = embedded("cross_tokenizer")
    found = check_ends(pair.student, pair.tokenizer, Teacher(pair.teacher, pair.teacher_tokenizer))
    assert found.fine and "not compared" in found.text


def test_what_trls_generation_takes_from_the_card_is_said(same):
    assert check_card(same.student).fine
    same.student.generation_config.no_repeat_ngram_size = 2
    found = check_card(same.student)
    assert not found.fine and "no_repeat_ngram_size" in found.text
    assert check_card(same.student, HFSampler(same.student, same.tokenizer)).fine


def test_dropout_of_attention_and_of_layers():
    model = tiny_qwen3()
    assert check_dropout(model).fine
    model.config.attention_dropout = 0.1
    assert not check_dropout(model).fine and check_dropout(model, switched_off=True).fine


def test_padded_embeddings_are_counted(same):
    student = tiny_qwen3(vocab_size=40)
    found = check_vocabularies_at_start(student, same.tokenizer, Teacher(same.teacher, same.tokenizer))
    assert found.text == "student 21 tokens and 19 padded embeddings, teacher 21 tokens"


def test_long_prompts_are_counted(same):
    teacher = Teacher(same.teacher, same.tokenizer)
    rows = [{"prompt": [{"role": "user", "content": "1+" * n + "1"}]} for n in (2, 60, 130, 140)]
    found = check_context(same.student, same.tokenizer, teacher, settings(), Dataset.from_list(rows))
    assert not found.fine and "2 of the 4 prompts" in found.text and "256" in found.text
    short = Dataset.from_list(rows[:2])
    assert check_context(same.student, same.tokenizer, teacher, settings(), short).fine


def test_memory_is_compared_with_what_is_there(same):
    teacher = Teacher(same.teacher, same.tokenizer)
    assert check_memory(same.student, teacher, settings()).fine
    huge = settings(max_completion_length=10**7, per_device_train_batch_size=1000)
    assert not check_memory(same.student, teacher, huge).fine


def test_a_sampler_with_other_weights_is_seen(same):
    own = HFSampler(same.student, same.tokenizer)
    assert check_sampler(same.student, own, settings(), same.task.train).fine
    stale = HFSampler(embedded("same").teacher, same.tokenizer)
    found = check_sampler(same.student, stale, settings(), same.task.train)
    assert not found.fine and "nats per token" in found.text


def test_a_teacher_that_is_not_better_is_said(same):
    worse = Teacher(tiny_qwen3(vocab_size=21), same.tokenizer)
    found = check_teacher(same.student, same.tokenizer, worse, settings(), same.task.test)
    assert not found.fine and "teacher 0 of 20" in found.text and "not better" in found.text
    better = Teacher(same.teacher, same.tokenizer)
    assert check_teacher(same.student, same.tokenizer, better, settings(), same.task.test).fine


def test_problems_with_answers_are_found(same):
    prompts = Dataset.from_list([{"prompt": "1+1", "answer": None}])
    assert with_answers(None, prompts) is None
    assert with_answers(prompts, same.task.test) is same.task.test


def test_nothing_is_changed_by_looking(same):
    before = {name: tensor.clone() for name, tensor in same.student.state_dict().items()}
    modes = [module.training for module in same.student.modules()]
    state = torch.get_rng_state()
    teacher = Teacher(same.teacher, same.tokenizer)
    findings_at_start(same.student, same.tokenizer, teacher, settings(), same.task.train)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in same.student.modules()] == modes
    assert all(torch.equal(before[name], tensor) for name, tensor in same.student.state_dict().items())


@pytest.fixture
def two_folders(tmp_path):
    """The embedded student, and itself as its teacher, whose template ends turns in another way."""
    for name in ("student", "teacher"):
        load_model("embedded/student").save_pretrained(tmp_path / name)
        tokenizer = load_tokenizer("embedded/student")
        if name == "teacher":
            tokenizer.chat_template = tokenizer.chat_template.replace("<|end|>", "<|assistant|>")
        tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / "student"), str(tmp_path / "teacher")


def test_a_run_says_at_its_start_what_a_check_says_in_full(two_folders, tmp_path, capsys):
    asked = ["train", *two_folders, "arithmetic", *SHORT.split()]
    assert main([*asked, "--output_dir", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert "checked: ends of turns, template, generation config, dropout, vocabularies" in shown.out
    assert shown.err.count("expect ever longer responses") == 1
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])["step"] == 1
    assert main([*asked, "--check"]) == 0
    shown = capsys.readouterr().out
    assert "warning: ends of turns" in shown and "warning: teacher against student" in shown
    assert "fine: head against logits" in shown and "everything that a run checks" not in shown
