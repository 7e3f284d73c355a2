"""`distil(student, teacher, task, objective)`: four things given, everything else read off them."""

import json

import pytest
from conftest import tiny_qwen3

from oprd_nb import OPRDConfig, Representation, Teacher, distil, embedded
from oprd_nb.explore.rollouts import answers_of
from oprd_nb.explore.scores import save_token_scores
from oprd_nb.objectives import Term
from oprd_nb.plots import write_report
from oprd_nb.runs import RunPaths, read_run
from oprd_nb.training.experiment import config_for, distil_pair, short_name, with_tokenizer

QUICK = {
    "max_steps": 2,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
}


class Nearer(Term):
    """A loss of a user's own."""

    def per_position(self, inputs):
        return (inputs.student[0] - inputs.teacher[0].take()).square().mean(-1), {}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with models and a task, and the weights before and after it."""
    pair = embedded("same")
    before = pair.student.model.layers[0].mlp.up_proj.weight.detach().clone()
    folder = tmp_path_factory.mktemp("distil") / "run"
    results = distil(pair.student, pair.teacher, pair.task, Nearer(), folder, held_out=6, samples=2, **QUICK)
    return results, folder, before, pair


def test_the_given_student_is_trained(run):
    results, _, before, pair = run
    assert set(results) == {"before", "after"}
    assert len(results["after"].samples) == 12
    assert (pair.student.model.layers[0].mlp.up_proj.weight - before).abs().max() > 1e-4


def test_the_folder_says_what_was_done(run):
    _, folder, _, _ = run
    stored = read_run(folder)
    assert (stored.method, stored.label) == ("Nearer", "Nearer")
    assert stored.config["student"] == "embedded/student"
    assert stored.config["teacher"] == "embedded/teacher"
    assert stored.config["max_completion_length"] == 48
    assert json.loads(RunPaths(folder).about.read_text())["task"] == "arithmetic"


def test_the_report_shows_curve_and_teacher(run, tmp_path):
    _, folder, _, _ = run
    stored = read_run(folder)
    assert stored.metrics["eval/avg@1"].notna().sum() == 3  # before the first of two steps, and after each
    assert stored.evals.steps == {"step-000000": 0, "step-000001": 1, "step-000002": 2}
    assert set(stored.evals) == {"before", "after", "teacher", *stored.evals.steps}
    kept = stored.evals["step-000002"]["correct"].mean()
    assert kept == stored.metrics.set_index("step")["eval/avg@1"].dropna()[2]
    page = write_report([stored], tmp_path / "report.html").read_text("utf-8")
    assert "Teacher" in page and "</span>Nearer" in page


def test_tokens_are_scored_at_each_evaluation(tmp_path):
    pair = embedded("same")
    steps = {"eval_strategy": "steps", "eval_steps": 1, "eval_samples": 1}
    args = OPRDConfig(str(tmp_path / "run"), max_completion_length=48, **QUICK, **steps)
    problems = pair.task.validation.select(range(5))
    options = {"eval_dataset": problems, "after_evaluation": save_token_scores, "held_out": 3}
    distil_pair(pair, Representation(), args, {}, **options)
    answers = answers_of(tmp_path / "run", ("before", "step-000001", "step-000002", "after"))
    counts = {name: len(table.groupby(["problem", "sample"])) for name, table in answers.tokens.items()}
    assert counts == {"before": 3, "step-000001": 5, "step-000002": 5, "after": 3}
    first, last = (answers.tokens[name]["distance"].mean() for name in ("step-000001", "step-000002"))
    assert last != first  # the weights of that step were asked


def test_names_in_place_of_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = QUICK | {"max_steps": 1, "eval_strategy": "no"}
    results = distil(
        "embedded/student",
        "embedded/teacher",
        "arithmetic",
        Representation(),
        held_out=2,
        samples=1,
        **settings,
    )
    assert set(results) == {"before", "after"}
    assert read_run(tmp_path / "runs" / "oprd").method == "oprd"


def test_a_teacher_of_its_own(tmp_path):
    pair = embedded("same")
    asked = []

    def prompt(messages):
        asked.append(messages)
        return messages

    teacher = Teacher(pair.teacher, pair.teacher_tokenizer, prompt=prompt)
    settings = QUICK | {"max_steps": 1, "eval_strategy": "no"}
    distil(
        pair.student,
        teacher,
        pair.task,
        Representation(),
        tmp_path / "run",
        held_out=2,
        samples=1,
        **settings,
    )
    assert len(asked) >= 8
    assert not (tmp_path / "run" / "eval" / "teacher.parquet").exists()


def test_a_model_from_memory_needs_its_tokenizer(same):
    model = tiny_qwen3()
    assert short_name(model) == ""
    with pytest.raises(ValueError, match=r"^student: it was made in memory.*give tokenizer="):
        with_tokenizer(model, "student")
    with pytest.raises(ValueError, match=r"^teacher: .*give Teacher\(model, tokenizer\)"):
        with_tokenizer(model, "teacher")
    assert with_tokenizer(model, "student", same.tokenizer) == (model, same.tokenizer)


@pytest.mark.parametrize("max_steps, every", [(8, 1), (100, 12), (3, 1)])
def test_eight_evaluations(same, tmp_path, max_steps, every):
    config = config_for(same.task, tmp_path, {"max_steps": max_steps})
    assert (str(config.eval_strategy.value), config.eval_steps) == ("steps", every)
    assert config.eval_on_start


def test_settings_win(same, tmp_path):
    config = config_for(same.task, tmp_path, {"eval_strategy": "no", "max_completion_length": 7})
    assert (config.eval_strategy.value, config.max_completion_length) == ("no", 7)


def test_a_run_by_epochs_is_evaluated_after_each(same, tmp_path):
    assert config_for(same.task, tmp_path, {"max_steps": -1}).eval_strategy.value == "epoch"
