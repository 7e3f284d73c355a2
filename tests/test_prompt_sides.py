"""What student and teacher are asked, in training, evaluation and the teacher's reading, on tiny models."""

import json

import pytest
from conftest import tiny_qwen3
from datasets import Dataset

from oprd_nb.evaluation import evaluate
from oprd_nb.models.pairs import embedded
from oprd_nb.objectives import Representation
from oprd_nb.rollouts import HFSampler, PromptFormat
from oprd_nb.rollouts.prompts import encode_prompts
from oprd_nb.teachers import Teacher
from oprd_nb.training import OPRDConfig, OPRDTrainer

ROWS = [{"prompt": [{"role": "user", "content": f"{i}+{i}"}], "answer": str(2 * i)} for i in range(1, 5)]
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}00{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
NO_SYSTEM += "{% for m in messages %}{{ m.content }}{% endfor %}="
OFF = {"enable_thinking": False}


def two_steps(tmp_path, student_template, teacher_template, rows=ROWS, teacher_options=None, **options):
    """Train two steps and evaluate; returns what was read: {"rollouts", "teacher", "evaluation"} as texts."""
    tokenizer = embedded("same").tokenizer
    tokenizer.chat_template = student_template
    teacher_tokenizer = embedded("same").tokenizer
    teacher_tokenizer.chat_template = teacher_template
    size = len(tokenizer)
    teacher = Teacher(tiny_qwen3(1, size), teacher_tokenizer, **(teacher_options or {}))
    read = {"rollouts": [], "teacher": [], "evaluation": []}
    plain_read = teacher.read

    def listening(rollouts, *arguments, **more):
        pairs = plain_read(rollouts, *arguments, **more)
        read["rollouts"] += [tokenizer.decode(ids) for ids in rollouts.prompt_ids()]
        read["teacher"] += [tokenizer.decode(ids) for ids in pairs.teacher_inputs.prompt_ids()]
        return pairs

    teacher.read = listening
    config = {"chat_template_kwargs": options.pop("chat_template_kwargs", None)}
    trainer = OPRDTrainer(
        model=tiny_qwen3(0, size),
        teacher=teacher,
        objective=Representation(),
        args=OPRDConfig(
            output_dir=str(tmp_path / "run"),
            max_steps=2,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            max_completion_length=4,
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            **config,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        **options,
    )
    trainer.train()
    sampler = trainer.synced_eval_sampler()
    result = evaluate(sampler, Dataset.from_list(ROWS), n=1, max_new_tokens=4, progress=False)
    assert len(result.samples) == len(ROWS)
    rollouts = sampler.sample([row["prompt"] for row in ROWS], max_new_tokens=2)
    read["evaluation"] = [tokenizer.decode(ids) for ids in rollouts.prompt_ids()]
    assert trainer.state.global_step == 2
    asked = json.loads((tmp_path / "run" / "about.json").read_text())["asked"]
    assert asked["student"] in read["evaluation"]
    assert "teacher_prompt" in rows[0] or set(read["teacher"]) <= {
        asked["teacher"].replace(f"{1}+{1}", f"{i}+{i}") for i in range(1, 5)
    }
    return {side: set(texts) for side, texts in read.items()}, result.settings


def sums(pattern):
    """What is read of every problem."""
    return {pattern.format(f"{i}+{i}") for i in range(1, 5)}


def test_a_base_model_without_a_template(tmp_path):
    read, _ = two_steps(tmp_path, None, None)
    assert read["rollouts"] and read["rollouts"] <= sums("{}") and read["teacher"] == read["rollouts"]
    assert read["evaluation"] == sums("{}")


@pytest.mark.parametrize("as_text", [True, False])
def test_a_base_model_with_a_template_of_ours(tmp_path, as_text):
    rows = [{"prompt": row["prompt"][0]["content"] if as_text else row["prompt"]} for row in ROWS]
    options = {"prompt_format": PromptFormat(template="{{ messages[0].content }}=")}
    read, settings = two_steps(tmp_path, None, None, rows, **options)
    assert read["rollouts"] and read["rollouts"] <= sums("{}=") and read["teacher"] == read["rollouts"]
    assert read["evaluation"] == sums("{}=")
    assert settings["prompt_format"] == {"template": "{{ messages[0].content }}="}


@pytest.mark.parametrize("where", ["config", "format"])
def test_thinking_off_reaches_rollouts_evaluation_and_teacher(tmp_path, where):
    options = {"chat_template_kwargs": OFF}
    if where == "format":
        options = {"prompt_format": PromptFormat(chat_template_kwargs=OFF)}
    # The teacher's template is its own, so its prompts are written and not copied.
    read, _ = two_steps(tmp_path, THINKING, THINKING.replace("00", "11"), **options)
    assert read["rollouts"] and read["rollouts"] <= sums("<|user|>{}<|assistant|>00")
    assert read["teacher"] and read["teacher"] <= sums("<|user|>{}<|assistant|>11")
    assert read["evaluation"] == sums("<|user|>{}<|assistant|>00")


def test_thinking_on_by_default(tmp_path):
    read, _ = two_steps(tmp_path, THINKING, THINKING)
    assert read["teacher"] == read["rollouts"] <= sums("<|user|>{}<|assistant|>")
    assert read["evaluation"] == sums("<|user|>{}<|assistant|>")


def test_thinking_off_in_token_ids():
    pair = embedded("same")
    pair.tokenizer.chat_template = THINKING
    thinking = encode_prompts(pair.tokenizer, ["1+1"])[0]
    off = PromptFormat(chat_template_kwargs=OFF)
    two = pair.tokenizer.encode("00", add_special_tokens=False)
    rollouts = HFSampler(pair.student, pair.tokenizer, prompt_format=off).sample(["1+1"], max_new_tokens=2)
    assert rollouts.prompt_ids() == [thinking + two]
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer, prompt_format=off)
    teacher.tokenizer.chat_template = THINKING
    assert teacher.read(rollouts, pair.tokenizer).teacher_inputs.prompt_ids() == [thinking + two]


def test_a_refused_system_message_names_the_row_and_folding_helps(tmp_path):
    system = PromptFormat(system="7")
    with pytest.raises(ValueError, match="row 0 has a system message.*--fold_system"):
        two_steps(tmp_path, NO_SYSTEM, NO_SYSTEM, prompt_format=system)
    folding = PromptFormat(system="7", fold_system=True)
    read, _ = two_steps(tmp_path, NO_SYSTEM, NO_SYSTEM, prompt_format=folding)
    assert read["teacher"] == read["rollouts"] and read["rollouts"]
    assert {text.replace("\n", " ").split()[0] for text in read["rollouts"]} == {"7"}
    assert {text.split()[-1] for text in read["evaluation"]} == sums("{}=")


def test_a_teacher_with_its_own_template(tmp_path):
    with pytest.warns(UserWarning, match="not its chat template"):
        read, _ = two_steps(tmp_path, "{{ messages[0].content }}=", THINKING)
    assert read["rollouts"] and read["rollouts"] <= sums("{}=")
    assert read["teacher"] and read["teacher"] <= sums("<|user|>{}<|assistant|>")
    assert read["evaluation"] == sums("{}=")


def test_a_teacher_with_its_own_system_message(tmp_path):
    own = {"prompt_format": PromptFormat(system="7")}
    read, _ = two_steps(tmp_path, THINKING, THINKING, teacher_options=own)
    assert read["rollouts"] <= sums("<|user|>{}<|assistant|>")
    assert read["teacher"] and read["teacher"] <= sums("<|system|>7<|user|>{}<|assistant|>")


def test_privileged_prompts(tmp_path):
    rows = [
        row
        | {"teacher_prompt": [{"role": "user", "content": row["prompt"][0]["content"] + "=" + row["answer"]}]}
        for row in ROWS
    ]
    read, _ = two_steps(tmp_path, THINKING, THINKING, rows, chat_template_kwargs=OFF)
    assert read["rollouts"] and read["rollouts"] <= sums("<|user|>{}<|assistant|>00")
    told = {f"<|user|>{i}+{i}={2 * i}<|assistant|>00" for i in range(1, 5)}
    assert read["teacher"] and read["teacher"] <= told
    assert read["evaluation"] == sums("<|user|>{}<|assistant|>00")
