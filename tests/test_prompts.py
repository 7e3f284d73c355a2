"""Prompts: what people bring, and what a model reads of it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from oprd_nb.core import Rollouts
from oprd_nb.models.pairs import embedded
from oprd_nb.rollouts.prompts import (
    PromptFormat,
    encode_prompts,
    read_template,
    render_prompts,
    repeat_prompts,
)
from oprd_nb.teachers import Teacher, asked_of_both

THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}00{% endif %}{% endif %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
NO_SYSTEM += "{% for m in messages %}{{ m.content }}{% endfor %}="
DROPS_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}="


def user(content):
    return {"role": "user", "content": content}


def text_of(tokenizer, prompt, **settings):
    return tokenizer.decode(encode_prompts(tokenizer, [prompt], **settings)[0])


def test_a_text_is_one_message_of_the_user_and_never_token_ids(same):
    assert encode_prompts(same.tokenizer, ["123"]) == encode_prompts(same.tokenizer, [[user("123")]])
    assert len(encode_prompts(same.tokenizer, ["123"])[0]) > 3


@pytest.mark.parametrize("prompt", ["24+72", [user("24+72")]])
def test_without_a_template_a_prompt_is_plain_text(same, prompt):
    same.tokenizer.chat_template = None
    assert text_of(same.tokenizer, prompt) == "24+72"
    assert text_of(same.tokenizer, prompt, template="{{ messages[0].content }}=") == "24+72="
    assert text_of(same.tokenizer, prompt, system="1").split() == ["1", "24+72"]


@pytest.mark.parametrize(
    "chat",
    [
        [user("1"), {"role": "assistant", "content": "2"}, user("3")],
        [user("1"), user("2")],
        [user("1") | {"name": "Ada"}],
    ],
)
def test_a_conversation_needs_a_template(same, chat):
    same.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="row 1 has .* no chat template .*--template FILE"):
        encode_prompts(same.tokenizer, ["1", chat])


@pytest.mark.parametrize("ids", [[3, 4], (3, 4), np.array([3, 4]), torch.tensor([3, 4]), [np.int64(3), 4]])
def test_token_ids_pass_through(same, ids):
    assert encode_prompts(same.tokenizer, [ids], system="1") == [[3, 4]]
    assert repeat_prompts(same.tokenizer, [ids, "1"], 1)[1] is None


def test_repeated_texts_come_back_as_messages(same):
    ids, chats = repeat_prompts(same.tokenizer, ["1+1", [user("2+2")]], 2)
    assert ids[0] == ids[1] != ids[2] == ids[3]
    assert chats == [[user("1+1")], [user("1+1")], [user("2+2")], [user("2+2")]]


def test_content_in_parts_is_joined_and_a_table_s_empty_columns_are_none(same):
    parts = [{"type": "text", "text": "24", "image": None}, {"type": "text", "text": "+72"}]
    assert text_of(same.tokenizer, [user(parts)]) == text_of(same.tokenizer, "24+72")
    calls = "{{ 1 if messages[0].tool_calls is defined else 0 }}{{ messages[0].name }}"
    message = user("5") | {"tool_calls": None, "name": "7"}
    assert text_of(same.tokenizer, [message], template=calls) == "07"


@pytest.mark.parametrize(
    "prompts, message",
    [
        ([], "prompts is empty"),
        ("1+1", "prompts is one text"),
        (["1", None], "row 1 is None"),
        ([7], "row 0 is 7"),
        ([1.5], "row 0 is 1.5"),
        ([[1.5, 2.5]], "row 0 message 0 is 1.5"),
        ([""], "row 0 content is '', which is empty"),
        ([[]], "row 0 has no messages"),
        ([[True, False]], "row 0 message 0 is True"),
        ([["1"]], "row 0 message 0 is '1'"),
        ([[{"role": "user"}]], "row 0 message 0 has no 'content'"),
        ([[{"from": "human", "value": "1"}]], "row 0 message 0 has no 'role'"),
        ([[{"role": "bot", "content": "1"}]], "role is 'bot'; use one of"),
        (
            [[user("1"), {"role": "assistant", "content": "2"}]],
            "row 0 ends with a message of the 'assistant'",
        ),
        ([[user([{"type": "image", "image": "x"}])]], "row 0 message 0 content has a part"),
        ([[{"role": "system", "content": "1"}]], "ends with a message of the 'system'"),
    ],
)
def test_what_is_no_prompt_is_refused_in_one_line(same, prompts, message):
    with pytest.raises(ValueError, match=message) as error:
        encode_prompts(same.tokenizer, prompts)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("template", [NO_SYSTEM, DROPS_SYSTEM])
def test_a_template_without_system_messages_names_the_row_or_folds(same, template):
    chat = [{"role": "system", "content": "1"}, user("2+2")]
    with pytest.raises(ValueError, match="row 1 has a system message.*fold_system"):
        encode_prompts(same.tokenizer, ["7", chat], template=template)
    assert text_of(same.tokenizer, chat, template=template, fold_system=True).split() == ["1", "2+2="]
    assert text_of(same.tokenizer, "2+2", system="3", fold_system=True, template=template).split() == [
        "3",
        "2+2=",
    ]
    assert text_of(same.tokenizer, "2+2", template=template) == "2+2="


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[0].nothing }}", "row 0 becomes nothing in the chat template"),
        ("{% if %}", "row 0 cannot be put into the chat template"),
        ("{{ messages[0].content.a.b }}", "row 0 cannot be put into the chat template"),
        ("{{ raise_exception('Roles must alternate') }}", "Roles must alternate"),
        ("{{ 1 // 0 }}", "row 0 cannot be put into the chat template"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_template_that_fails_is_one_line(same, template, message, own):
    settings = {"template": template}
    if own:
        same.tokenizer.chat_template = template
        settings = {}
    with pytest.raises(ValueError, match=message) as error:
        encode_prompts(same.tokenizer, ["1"], **settings)
    assert "\n" not in str(error.value)


def test_an_empty_template_of_a_tokenizer_is_refused(same):
    same.tokenizer.chat_template = ""
    with pytest.raises(ValueError, match="row 0 becomes nothing in the chat template"):
        encode_prompts(same.tokenizer, ["1"])


def test_switches_of_the_template_reach_it(same):
    same.tokenizer.chat_template = THINKING
    thinking = encode_prompts(same.tokenizer, ["1+1"])[0]
    off = PromptFormat(chat_template_kwargs={"enable_thinking": False})
    zero = same.tokenizer.encode("0", add_special_tokens=False)
    assert encode_prompts(same.tokenizer, ["1+1"], off)[0] == thinking + 2 * zero
    assert render_prompts(same.tokenizer, ["1+1"], off) == ["<|user|>1+1<|assistant|>00"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"system": ""}, "system=''"),
        ({"system": 3}, "system=3"),
        ({"template": " "}, "template=' '"),
        ({"chat_template_kwargs": "enable_thinking"}, "chat_template_kwargs='enable_thinking'"),
        ({"chat_template_kwargs": {"tokenize": False}}, "'tokenize' is set by the kit"),
    ],
)
def test_settings_that_mean_nothing(settings, message):
    with pytest.raises(ValueError, match=message):
        PromptFormat(**settings)


def test_a_system_message_takes_the_place_of_the_prompt_s_own():
    chat = [{"role": "system", "content": "old"}, user("q")]
    assert PromptFormat(system="new").messages(chat) == [{"role": "system", "content": "new"}, user("q")]
    assert PromptFormat().messages(chat) == chat
    assert chat[0]["content"] == "old"


def test_template_files(tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages[0].content }}")
    assert read_template(file) == "{{ messages[0].content }}"
    file.write_text(" ")
    with pytest.raises(ValueError, match="is empty"):
        read_template(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="cannot be read"):
        read_template(file)


def rollouts_of(same, prompts, prompt_format=None, tokenizer=None):
    """Rollouts with a fixed response."""
    tokenizer = tokenizer or same.tokenizer
    ids = encode_prompts(tokenizer, prompts, prompt_format)
    answer = tokenizer.encode("96", add_special_tokens=False)
    return Rollouts.from_ids(ids, [[*answer, tokenizer.eos_token_id]] * len(ids), 0, prompts)


def read_by(teacher, rollouts, tokenizer, **options):
    """The teacher's prompts as text, and its responses."""
    inputs = teacher.read(rollouts, tokenizer, **options).teacher_inputs
    assert inputs.responses() == rollouts.responses()
    return [teacher.tokenizer.decode(ids) for ids in inputs.prompt_ids()]


def test_a_teacher_with_the_student_s_template_reads_the_student_s_prompt(same):
    teacher = Teacher(same.teacher, same.teacher_tokenizer)
    off = PromptFormat(system="7", template=THINKING, chat_template_kwargs={"enable_thinking": False})
    rollouts = rollouts_of(same, ["24+72"], off)
    assert read_by(teacher, rollouts, same.tokenizer) == render_prompts(same.tokenizer, ["24+72"], off)


@pytest.mark.parametrize("students", [None, "{{ messages[0].content }}="])
def test_where_templates_differ_the_teacher_s_own_is_used_and_said(same, students):
    base = embedded("same").tokenizer
    base.chat_template = students
    rollouts = rollouts_of(same, ["24+72", [user("1+1")]], tokenizer=base)
    teacher = Teacher(same.teacher, same.teacher_tokenizer)
    with pytest.warns(UserWarning, match="not its chat template.*--teacher_template"):
        read = read_by(teacher, rollouts, base)
    assert read == render_prompts(same.teacher_tokenizer, ["24+72", "1+1"])
    both = asked_of_both("24+72", base, same.teacher_tokenizer)
    assert both == {"student": "24+72" + ("=" if students else ""), "teacher": read[0]}


def test_a_teacher_without_a_template_reads_what_the_student_read(same):
    base = embedded("same").tokenizer
    base.chat_template = None
    rollouts = rollouts_of(same, ["24+72"])
    assert read_by(Teacher(same.teacher, base), rollouts, same.tokenizer) == render_prompts(
        same.tokenizer, ["24+72"]
    )


def test_a_teacher_s_own_format_and_privileged_prompts(same):
    own = PromptFormat(system="7", template=THINKING, chat_template_kwargs={"enable_thinking": False})
    teacher = Teacher(same.teacher, same.teacher_tokenizer, prompt_format=own)
    rollouts = rollouts_of(same, ["24+72"])
    assert read_by(teacher, rollouts, same.tokenizer) == ["<|system|>7<|user|>24+72<|assistant|>00"]
    read = read_by(teacher, rollouts, same.tokenizer, prompts=["24+72=96"])
    assert read == ["<|system|>7<|user|>24+72=96<|assistant|>00"]
    both = asked_of_both("24+72", same.tokenizer, same.tokenizer, None, own, teacher_prompt="24+72=96")
    assert both == {"student": render_prompts(same.tokenizer, ["24+72"])[0], "teacher": read[0]}


def test_a_teacher_with_other_tokens_has_a_format_too():
    pair = embedded("cross_tokenizer")
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer, prompt_format=PromptFormat(system="7"))
    rollouts = rollouts_of(pair, ["24+72"])
    inputs = teacher.read(rollouts, pair.tokenizer, prompts=["24+72=96"]).teacher_inputs
    expected = encode_prompts(pair.teacher_tokenizer, ["24+72=96"], system="7")
    assert inputs.prompt_ids() == expected


def test_token_ids_cannot_be_asked_otherwise(same):
    rollouts = rollouts_of(same, ["24+72"])
    ids = replace(rollouts, prompts=None)
    teacher = Teacher(same.teacher, same.teacher_tokenizer, prompt_format=PromptFormat(system="7"))
    with pytest.raises(ValueError, match="rollouts.prompts is None"):
        teacher.read(ids, same.tokenizer)
