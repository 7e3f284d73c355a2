"""How student and teacher are asked, and how tokens are drawn, from the command line, on tiny models."""

import json
from pathlib import Path

import datasets
import pandas as pd
import pytest
import yaml

from oprd_nb.cli import main
from oprd_nb.cli.asking import SideArguments, load_problems
from oprd_nb.cli.request import TrainArguments
from oprd_nb.cli.train import training_prompts, validation_problems
from oprd_nb.evaluation import Evaluation
from oprd_nb.models import load_model, load_tokenizer
from oprd_nb.rollouts.prompts import PromptFormat, encode_prompts
from oprd_nb.rollouts.samplers import HFSampler
from oprd_nb.tasks import loading
from oprd_nb.tasks.loading import load_task
from oprd_nb.teachers import Teacher

SUMS = ["1+1+2", "2+2+3", "3+3+4", "4+4+5", "5+5+6", "6+6+7"]
THINKING = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}00{% endif %}"
)
REFUSES = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
REFUSES += "{% for m in messages %}{{ m.content }}{% endfor %}="
SHORT = "--max_steps 2 --max_completion_length 8 --per_device_train_batch_size 2 --use_cpu true --samples 1"
SHORT += " --save_strategy no --gradient_accumulation_steps 1 --disable_tqdm true --num_generations 1"
OFF = '{"enable_thinking": false}'


@pytest.fixture
def models(tmp_path):
    """Makes folders of the embedded student and teacher with other chat templates."""

    def make(student_template, teacher_template):
        folders = []
        for name, template in (("student", student_template), ("teacher", teacher_template)):
            folder = tmp_path / name
            load_model(f"embedded/{name}").save_pretrained(folder)
            tokenizer = load_tokenizer(f"embedded/{name}")
            tokenizer.chat_template = template
            tokenizer.save_pretrained(folder)
            folders.append(str(folder))
        return folders

    return make


@pytest.fixture
def problems(tmp_path):
    """Writes a file of problems; returns its path."""

    def write(name="sums.jsonl", question="prompt", answer="answer", **more):
        rows = [{question: text, answer: str(eval(text)), **more} for text in SUMS]  # noqa: S307
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture
def heard(monkeypatch):
    """The prompts that are read from now on, as texts: of rollouts, by the teacher, and in evaluations."""
    texts = {"rollouts": set(), "teacher": set(), "written": set()}
    plain_read = Teacher.read
    plain_sample = HFSampler.sample

    def read(self, rollouts, student_tokenizer, *more, **options):
        pairs = plain_read(self, rollouts, student_tokenizer, *more, **options)
        texts["rollouts"] |= {student_tokenizer.decode(ids) for ids in rollouts.prompt_ids()}
        texts["teacher"] |= {self.tokenizer.decode(ids) for ids in pairs.teacher_inputs.prompt_ids()}
        return pairs

    def sample(self, prompts, *more, **options):
        rollouts = plain_sample(self, prompts, *more, **options)
        texts["written"] |= {self.tokenizer.decode(ids) for ids in rollouts.prompt_ids()}
        return rollouts

    monkeypatch.setattr(Teacher, "read", read)
    monkeypatch.setattr(HFSampler, "sample", sample)
    return texts


def train(student, teacher, file, folder, *more):
    """Two steps, measured before and after on the same problems; the code of `oprd train`."""
    asked = [student, teacher, file, "--test", file, "--output_dir", str(folder), *SHORT.split(), *more]
    return main(["train", *asked])


def filled(pattern):
    return {pattern.format(text) for text in SUMS}


def about(folder):
    return json.loads((folder / "about.json").read_text())


def test_a_base_model_without_a_template(models, problems, heard, tmp_path, capsys):
    assert train(*models(None, None), problems(), tmp_path / "run") == 0, capsys.readouterr().err
    assert heard["rollouts"] and heard["teacher"] == heard["rollouts"] <= filled("{}")
    assert heard["written"] == filled("{}")
    assert about(tmp_path / "run")["asked"] == {"student": SUMS[0], "teacher": SUMS[0]}
    assert "student and teacher are asked: '1+1+2'" in capsys.readouterr().out
    assert (tmp_path / "run" / "eval" / "after.parquet").is_file()


def test_a_base_model_with_a_template_file_and_a_teacher_with_its_own(models, problems, heard, tmp_path):
    (tmp_path / "a.jinja").write_text("{{ messages[0].content }}=")
    (tmp_path / "b.jinja").write_text("0+{{ messages[0].content }}=")
    files = ["--template", str(tmp_path / "a.jinja"), "--teacher_template", str(tmp_path / "b.jinja")]
    assert train(*models(None, None), problems(), tmp_path / "run", *files) == 0
    assert heard["rollouts"] and heard["rollouts"] <= filled("{}=")
    assert heard["teacher"] and heard["teacher"] <= filled("0+{}=")
    assert heard["written"] == filled("{}=") | filled("0+{}=")
    stored = Evaluation.load(tmp_path / "run" / "eval" / "teacher.parquet").settings
    assert stored["prompt_format"]["template"].startswith("0+")
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["template"] == files[1]


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_reaches_rollouts_evaluation_and_teacher(thinking, models, problems, heard, tmp_path):
    """The token ids of all three end with what the template writes where thinking is off."""
    student, teacher = models(THINKING, THINKING)
    switches = [] if thinking else ["--chat_template_kwargs", OFF]
    assert train(student, teacher, problems(), tmp_path / "run", *switches) == 0
    end = "" if thinking else "00"
    assert heard["rollouts"] and heard["teacher"] == heard["rollouts"]
    assert heard["rollouts"] | heard["written"] == filled("<|user|>{}<|assistant|>" + end)
    ids = encode_prompts(
        load_tokenizer(student),
        SUMS[:1],
        PromptFormat(chat_template_kwargs=None if thinking else {"enable_thinking": False}),
    )[0]
    zeros = load_tokenizer(student)("00", add_special_tokens=False)["input_ids"]
    assert (ids[-2:] == zeros) is not thinking


def test_a_mapping_repeats_the_run_from_its_own_config(models, problems, heard, tmp_path):
    student, teacher = models(THINKING, THINKING)
    more = [
        "--chat_template_kwargs",
        OFF,
        "--system",
        "1+1",
        "--fold_system",
        "true",
        "--stop",
        "+",
        "--top_p",
        "0.9",
    ]
    assert train(student, teacher, problems(), tmp_path / "first", *more) == 0
    config = tmp_path / "first" / "config.yaml"
    assert yaml.safe_load(config.read_text())["chat_template_kwargs"] == {"enable_thinking": False}
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "second")]) == 0

    def losses(name):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]

    assert losses("first") == losses("second") and len(losses("first")) == 2
    assert about(tmp_path / "first")["asked"] == about(tmp_path / "second")["asked"]
    assert about(tmp_path / "second")["sampling"].startswith("temperature 1, top_p 0.9, stop at '+'")
    assert yaml.safe_load(config.read_text()) == yaml.safe_load((tmp_path / "second/config.yaml").read_text())


def test_a_template_that_refuses_a_system_message(models, problems, heard, tmp_path, capsys):
    student, teacher = models(REFUSES, REFUSES)
    more = ["--system", "0+0"]
    assert train(student, teacher, problems(), tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert "row 0" in error and "--fold_system" in error and "Traceback" not in error
    assert train(student, teacher, problems(), tmp_path / "run", *more, "--fold_system", "true") == 0
    assert heard["rollouts"] | heard["written"] == filled("0+0\n\n{}=")


def test_a_teacher_with_a_system_message_of_its_own(models, problems, heard, tmp_path):
    more = ["--system", "1+1", "--teacher_system", "2+2"]
    assert train(*models(THINKING, THINKING), problems(), tmp_path / "run", *more) == 0
    assert heard["rollouts"] and heard["rollouts"] <= filled("<|system|>1+1<|user|>{}<|assistant|>")
    assert heard["teacher"] and heard["teacher"] <= filled("<|system|>2+2<|user|>{}<|assistant|>")


def test_a_column_of_prompts_for_the_teacher(models, problems, heard, tmp_path):
    file = problems(teacher_prompt="0+0+0")
    assert train(*models(THINKING, THINKING), file, tmp_path / "run") == 0
    assert heard["rollouts"] and heard["rollouts"] <= filled("<|user|>{}<|assistant|>")
    assert heard["teacher"] - filled("<|user|>{}<|assistant|>") == {"<|user|>0+0+0<|assistant|>"}
    assert about(tmp_path / "run")["asked"]["teacher"] == "<|user|>0+0+0<|assistant|>"


def test_columns_and_grader(models, problems, tmp_path, capsys):
    file = problems(question="question", answer="label")
    more = ["--prompt_column", "question", "--answer_column", "label", "--grade_with", "number"]
    student, teacher = models(None, None)
    assert train(student, teacher, file, tmp_path / "run", *more) == 0, capsys.readouterr().err
    stored = Evaluation.load(tmp_path / "run" / "eval" / "before.parquet")
    assert stored.settings["grade_with"] == "number" and stored.samples["answer"].tolist() == [
        str(eval(text))  # noqa: S307
        for text in SUMS
    ]
    assert main(["train", student, teacher, file, "--output_dir", str(tmp_path / "b"), *SHORT.split()]) == 2
    assert "--prompt_column" in capsys.readouterr().err
    for command in ("probe", "bridge"):
        out = ["--max_new_tokens", "4", "--out", str(tmp_path / command), "--rank", "2"]
        out = out if command == "bridge" else out[:4]
        assert main([command, student, teacher, file, *out, *more[:2]]) == 0, capsys.readouterr().err


def test_prompts_without_answers_beside_a_test_set_that_has_them(problems, tmp_path):
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"question": "1+1"}\n')
    graded = problems(question="question", answer="label")
    args = SideArguments(prompt_column="question", answer_column="label")
    assert len(load_problems(str(plain), args, others=[graded]).problems) == 1
    assert len(load_problems("arithmetic", args, others=[graded]).test) > 1
    for name, others in ((str(plain), []), ("arithmetic", ["math500"])):
        with pytest.raises(ValueError, match="_column="):
            load_problems(name, args, others=others)
    with pytest.raises(ValueError, match="answer_column='label'"):
        load_problems(str(plain), args, need_answers=True, others=[graded])


@pytest.mark.parametrize("name", ["words", "owner/name"])
def test_each_set_names_its_own_part(name, monkeypatch):
    def hub(hub_id, configuration, split):
        assert (hub_id, configuration) == ("owner/name", "main")
        return datasets.Dataset.from_dict({"prompt": [f"1+1 of {split}"], "answer": ["2"]})

    monkeypatch.setattr(loading, "_hub_reason", lambda _: None)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    words = load_task("words")
    main_part = "" if name == "words" else "configuration=main,"
    args = TrainArguments(
        "student",
        "teacher",
        prompts=f"{name}:{main_part}split=train",
        test=f"{name}:{main_part}split=validation",
        validation=f"{name}:{main_part}split=test",
    )
    found = {
        "train": training_prompts(args).train,
        "validation": training_prompts(args).test,
        "test": validation_problems(args),
    }
    for split, rows in found.items():
        if name == "words":
            assert rows["prompt"] == words.splits()[split]["prompt"]
        else:
            assert rows["prompt"][0][-1]["content"] == f"1+1 of {split}"


def test_stored_samples_of_another_template_are_not_reused(models, problems, tmp_path, capsys):
    student, _ = models(THINKING, THINKING)
    request = ["eval", student, "--task", problems(), "--samples", "1", "--max_new_tokens", "4"]
    request += ["--out", str(tmp_path / "out")]
    assert main(request) == 0
    assert main(request) == 0
    template = Path(student) / "chat_template.jinja"
    template.write_text(template.read_text() + "=")
    capsys.readouterr()
    assert main(request) == 2
    assert "another template or tokenizer" in capsys.readouterr().err


def test_eval_takes_settings_prompts_and_a_models_card(models, problems, heard, tmp_path, capsys):
    student, teacher = models(THINKING, THINKING)
    card = {"do_sample": True, "temperature": 0.6, "top_k": 5, "eos_token_id": 1}
    (tmp_path / "student" / "generation_config.json").write_text(json.dumps(card))
    common = ["--samples", "1", "--max_new_tokens", "4", "--chat_template_kwargs", OFF, "--stop", "+"]
    common += ["--out", str(tmp_path / "out"), "--top_p", "0.8", "--system", "1+1", "--teacher_system", "2+2"]
    common += ["--from_generation_config", "true", "--outside", teacher]
    assert main(["eval", student, teacher, "--task", problems(), *common]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "student, effective: temperature 0.6, top_p 0.8, top_k 5, stop at '+', at most 4 tokens" in shown
    assert f"is asked: '<|system|>2+2<|user|>{SUMS[0]}<|assistant|>00'" in shown
    assert heard["written"] == {
        text for system in ("1+1", "2+2") for text in filled(f"<|system|>{system}<|user|>{{}}<|assistant|>00")
    }
    (parquet,) = (tmp_path / "out").glob("*student--sums.parquet")
    settings = pd.read_parquet(parquet).attrs["oprd_nb.evaluation"]
    assert settings["top_k"] == 5 and settings["stop"] == ["+"] and settings["temperature"] == 0.6
    assert settings["prompt_format"]["chat_template_kwargs"] == {"enable_thinking": False}


def test_train_takes_the_students_card_except_for_what_is_given(models, problems, tmp_path, capsys):
    student, teacher = models(None, None)
    card = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 5}
    (tmp_path / "student" / "generation_config.json").write_text(json.dumps(card))
    more = ["--from_generation_config", "true", "--temperature", "1.0"]
    assert train(student, teacher, problems(), tmp_path / "run", *more) == 0
    assert "effective: rollouts temperature 1, top_p 0.95, top_k 5" in capsys.readouterr().out
    settings = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (settings["temperature"], settings["top_p"], settings["eval_temperature"]) == (1.0, 0.95, 0.6)
    assert "from_generation_config" not in settings
    (tmp_path / "student" / "generation_config.json").write_text('{"do_sample": false}')
    assert train(student, teacher, problems(), tmp_path / "b", "--from_generation_config", "true") == 2
    assert "--temperature" in capsys.readouterr().err


def test_an_evaluation_of_a_run_asks_as_the_run_does(models, problems, heard, tmp_path):
    student, teacher = models(THINKING, THINKING)
    assert train(student, teacher, problems(), tmp_path / "run", "--chat_template_kwargs", OFF) == 0
    heard["written"].clear()
    into = ["--into", str(tmp_path / "run"), "--samples", "1", "--max_new_tokens", "4"]
    assert main(["eval", student, "--task", problems("other.jsonl"), *into]) in (0, 2)
    (tmp_path / "run" / "eval" / "before.parquet").unlink()
    assert main(["eval", student, "--task", problems("other.jsonl"), *into]) == 0
    assert heard["written"] == filled("<|user|>{}<|assistant|>00")


def test_another_template_file_is_another_run(models, problems, tmp_path, capsys):
    """On resumption what is asked is compared, not only the name of the file."""
    student, teacher = models(None, None)
    template = tmp_path / "a.jinja"
    template.write_text("{{ messages[0].content }}=")
    more = ["--template", str(template), "--save_strategy", "steps", "--save_steps", "1"]
    assert train(student, teacher, problems(), tmp_path / "run", *more) == 0
    template.write_text("{{ messages[0].content }}+")
    assert train(student, teacher, problems(), tmp_path / "run", *more, "--max_steps", "3", "--resume") == 2
    assert "asked=" in capsys.readouterr().err


def test_wrong_settings_are_one_line(models, problems, tmp_path, capsys):
    student, teacher = models(None, None)
    file = problems()
    for more, named in (
        (["--template", "nowhere.jinja"], "template='nowhere.jinja'"),
        (["--teacher_template", "nowhere.jinja"], "template='nowhere.jinja'"),
        (["--chat_template_kwargs", "{bad"], "chat_template_kwargs='{bad'"),
        (["--grade_with", "best"], "grade_with='best'"),
        (["--grade_with", "nowhere:grade"], "grade_with='nowhere:grade'"),
        (["--answer_column", "label"], "answer_column='label'"),
        (["--top_p", "2"], "top_p=2"),
    ):
        pair = [student, teacher, file, "--test", file, *SHORT.split()]
        for command, base in (
            ("train", [*pair, "--output_dir", str(tmp_path / "run")]),
            ("eval", [student, "--task", file, "--out", str(tmp_path / "run")]),
        ):
            assert main([command, *base, *more]) == 2
            error = capsys.readouterr().err
            assert named in error and error.count(f"oprd {command}: ") == 1, (command, error)
    assert not (tmp_path / "run").exists()


def test_switches_that_no_template_reads_are_said(models, problems, tmp_path, capsys):
    student, teacher = models(THINKING, THINKING)
    misspelt = ["--chat_template_kwargs", '{"enable_thinkng": false}']
    assert train(student, teacher, problems(), tmp_path / "run", *misspelt) == 0
    assert capsys.readouterr().err.count("the student's does not read ['enable_thinkng']") == 1
    short = ["--samples", "1", "--max_new_tokens", "4", "--out", str(tmp_path / "out")]
    assert main(["eval", student, "--task", problems(), *short, *misspelt]) == 0
    assert "does not read ['enable_thinkng']" in capsys.readouterr().err


def test_a_stop_text_that_looks_like_a_flag_comes_back_from_a_file(models, problems, tmp_path):
    student, teacher = models(None, None)
    assert train(student, teacher, problems(), tmp_path / "run", "--stop=---") == 0
    config = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(config.read_text())["stop"] == ["---"]
    assert main(["train", "--config", str(config), "--output_dir", str(tmp_path / "again")]) == 0


@pytest.mark.parametrize("command", ["probe", "bridge"])
def test_probe_and_bridge_ask_both_sides_likewise(command, models, problems, heard, tmp_path, capsys):
    student, teacher = models(THINKING, THINKING)
    more = ["--max_new_tokens", "8", "--out", str(tmp_path / "out"), "--chat_template_kwargs", OFF]
    more += ["--system", "1+1", "--teacher_system", "2+2"]
    more += ["--rank", "2", "--positions", "all"] if command == "bridge" else []
    assert main([command, student, teacher, problems(), *more]) == 0, capsys.readouterr().err
    assert heard["rollouts"] == filled("<|system|>1+1<|user|>{}<|assistant|>00")
    assert heard["teacher"] == filled("<|system|>2+2<|user|>{}<|assistant|>00")
    # The probe lets the teacher answer the problems too, to grade it.
    by_teacher = heard["teacher"] if command == "probe" else set()
    assert heard["written"] == heard["rollouts"] | by_teacher
    asked = about(tmp_path / "out")["asked"]
    assert asked["teacher"] == f"<|system|>2+2<|user|>{SUMS[0]}<|assistant|>00"
    assert "teacher is asked: '<|system|>2+2" in capsys.readouterr().out


def test_a_students_base_is_asked_with_a_message_of_its_own(models, problems, heard, tmp_path):
    student, _ = models(THINKING, THINKING)
    more = ["--lora", "2", "--teacher_system", "2+2"]
    assert train(student, "base", problems(), tmp_path / "run", *more) == 0
    assert heard["rollouts"] and heard["rollouts"] <= filled("<|user|>{}<|assistant|>")
    assert filled("<|system|>2+2<|user|>{}<|assistant|>") & heard["teacher"]
