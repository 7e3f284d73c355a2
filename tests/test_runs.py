"""Run folders: written and read back, merged, refused, described, and how long it takes."""

import json
import re
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy import stats

import oprd_nb
from oprd_nb.objectives import FullKL, Representation, SampledTokenKL
from oprd_nb.objectives.terms import Term, as_objective
from oprd_nb.runs import (
    METHODS,
    metric_of,
    metrics_table,
    mu_table,
    peak_memory,
    problem_scores,
    read_metrics,
    read_run,
    set_scores,
    summary_table,
    synthetic_metrics,
    synthetic_run,
    write_about,
    write_settings,
)
from oprd_nb.runs.tables import final_metrics
from oprd_nb.training.config import method_and_label
from oprd_nb.training.experiment import write_summary
from oprd_nb.utils import OKABE_ITO, TOL_MUTED, results_folder


def test_a_run_comes_back_as_it_was_written(tmp_path):
    run = read_run(synthetic_run(tmp_path / "a", "oprd", seed=3, steps=20, problems=30, samples=2))
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert run.metrics["loss"].tolist() == [line["loss"] for line in lines]
    assert run.metrics["eval/avg@1"].notna().sum() == sum("eval/avg@1" in line for line in lines)
    assert run.config["seed"] == 3
    assert set(run.evals) == {"before", "after"}
    assert len(run.evals["after"]) == 60
    grades = set(run.evals.grades("after"))
    assert not {"prompt", "response"} & grades
    assert {"correct", "tokens"} <= grades


def test_settings_and_facts_come_back_as_they_were_written(tmp_path):
    settings = {"method": "oprd", "learning_rate": 1e-5, "layers": [1, 5], "bf16": False, "replay": None}
    about = {"label": "OPRD", "versions": {"torch": "2.13.0"}, "objective": ["1 * Representation()"]}
    write_settings(tmp_path, settings)
    write_about(tmp_path, about)
    run = read_run(tmp_path)
    assert run.config == settings
    assert run.about == about
    assert list(run.config) == list(settings), "a reader finds the settings in the order they were written"
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("value", [(1, 2), [(1,)], {1, 2}, object(), {"a": {1}}, {1: "a"}])
def test_a_setting_that_yaml_would_not_give_back_is_refused(tmp_path, value):
    with pytest.raises(ValueError, match=r"settings\['odd'\]"):
        write_settings(tmp_path, {"method": "oprd", "odd": value})
    assert not list(tmp_path.iterdir())


def test_a_run_of_the_first_schema_is_read_into_settings_and_facts(tmp_path):
    old = {
        "method": "bridge",
        "seed": 0,
        "label": "OPRD-Bridge",
        "bridge": "Bridge(...)",
        "versions": {"trl": "1"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
    run = read_run(tmp_path)
    assert run.config == {"method": "bridge", "seed": 0}
    assert run.about == {"label": "OPRD-Bridge", "bridge": "Bridge(...)", "versions": {"trl": "1"}}
    # With an about.json the same name is a setting: the folder of a bridge, as on the command line.
    write_settings(tmp_path, {"method": "bridge", "bridge": "runs/bridge"})
    write_about(tmp_path, {})
    assert read_run(tmp_path).config["bridge"] == "runs/bridge"


def test_every_stored_run_is_read_and_has_no_fact_among_its_settings():
    folders = [path.parent for path in results_folder().glob("**/config.yaml")]
    assert len(folders) >= 21
    for folder in folders:
        run = read_run(folder)
        assert {"label", "command", "versions", "objective"} <= set(run.about)
        assert not {"label", "command", "versions", "objective", "task"} & set(run.config)
        assert all(not isinstance(value, dict) for value in run.config.values())


# ---- metrics


def test_every_stored_and_every_synthetic_metric_is_described():
    logged = set(synthetic_metrics("oprd", steps=20)[-1])
    for path in results_folder().glob("**/metrics.jsonl"):
        logged |= set(read_metrics(path))
    undescribed = [name for name in logged if not metric_of(name).unit]
    assert not undescribed


def test_every_metric_that_the_package_writes_is_described():
    literal = re.compile(r"""["']((?:rep|actor|teacher|topk|grad|time|memory|sampler|pairing)/[\w@]+)["']""")
    package = Path(oprd_nb.__file__).parent
    written = set()
    for path in package.rglob("*.py"):
        written |= set(literal.findall(path.read_text()))
    assert len(written) > 12
    assert not [name for name in written if not metric_of(name).unit]


def test_a_metric_with_a_number_in_its_name_has_it_in_its_title():
    assert metric_of("eval/avg@16").axis == "Accuracy (Avg@16)"
    assert metric_of("rep/cosine_layer_30") == metric_of("rep/cosine_layer_1")
    assert metric_of("eval/avg@").axis == "eval/avg@"
    assert metric_of("response/truncated").is_share


def test_resumed_steps_count_once_and_a_torn_last_line_waits(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        '{"step": 2, "loss": 5.0, "a": 1}\n{"step": 1, "loss": 6.0}\n\n'
        '{"step": 2, "loss": 4.0}\n{"step": 3, "lo'
    )
    table = read_metrics(log)
    assert table["step"].tolist() == [1, 2]
    assert table["loss"].tolist() == [6.0, 4.0]
    assert table["a"].iloc[1] == 1
    log.write_text('{"step": 1, "loss": 6.0}\n{"step": 2, "loss": 4.0}')
    assert read_metrics(log)["step"].tolist() == [1, 2]
    log.write_text("")
    assert read_metrics(log).empty
    log.write_text('{"step": 1, "loss": 6.0}\n{"step": 1, "loss": NaN, "a": null}\n')
    assert read_metrics(log)["loss"].tolist() == [6.0], "what is not a number replaces none"


@pytest.mark.parametrize("line", ["not json", "[1, 2]", '{"loss": 1}', "3"])
def test_a_damaged_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    with pytest.raises(ValueError, match="line 2") as error:
        read_metrics(tmp_path / "metrics.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("config.yaml", None, "no config.yaml"),
        ("config.yaml", "a: [", "damaged"),
        ("config.yaml", "seed: 1\n", "names no 'method'"),
        ("config.yaml", "", "names no 'method'"),
        ("summary.json", "{", "damaged"),
        ("about.json", "{", "damaged"),
        ("config.yaml", "[1, 2]", "damaged"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_in_one_line(tmp_path, name, content, message):
    folder = synthetic_run(tmp_path / "run", steps=2, problems=3)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        read_run(folder)
    assert "\n" not in str(error.value)
    assert "run=" in str(error.value)


def test_a_run_that_has_only_begun_is_a_run(tmp_path):
    (tmp_path / "config.yaml").write_text("method: oprd\n")
    run = read_run(tmp_path)
    assert run.metrics.empty
    assert not run.evals
    assert run.summary == {}
    assert run.label == "OPRD"
    assert np.isnan(summary_table(run)["accuracy"].iloc[0])
    with pytest.raises(KeyError, match="after.parquet"):
        run.evals["after"]


def test_scores_by_hand():
    samples = pd.DataFrame(
        {
            "set": ["a", "a", "a", "a", "b"],
            "problem": [0, 0, 1, 1, 0],
            "correct": [True, False, False, False, True],
        }
    )
    scores = problem_scores(samples)
    assert scores["avg"].tolist() == [0.5, 0.0, 1.0]
    assert scores["best"].tolist() == [1.0, 0.0, 1.0]
    assert len(problem_scores(samples.drop(columns="set"))) == 2


def test_outcomes_of_seeds_are_their_mean_with_a_t_interval(tmp_path):
    runs = [synthetic_run(tmp_path / str(seed), "oprd", seed, steps=10, problems=50) for seed in range(3)]
    accuracies = [read_run(run).evals["after"]["correct"].mean() for run in runs]
    row = summary_table(runs).iloc[0]
    low, high = stats.t.interval(0.95, 2, np.mean(accuracies), stats.sem(accuracies))
    assert row["seeds"] == 3
    assert row["accuracy"] == pytest.approx(np.mean(accuracies))
    assert (row["low"], row["high"]) == pytest.approx((max(0, low), min(1, high)))
    single = summary_table(runs[0]).iloc[0]
    assert single["low"] < single["accuracy"] < single["high"]
    assert single["seconds"] == pytest.approx(2.2)
    assert single["delta_peak"] == 9.5e7


def test_runs_with_other_labels_are_not_averaged(tmp_path):
    runs = [
        synthetic_run(
            tmp_path / str(rate),
            "oprd",
            steps=10,
            problems=20,
            about={"label": f"OPRD, lr {rate}"},
            learning_rate=rate,
        )
        for rate in (1e-3, 3e-3)
    ]
    assert summary_table(runs)["label"].tolist() == ["OPRD, lr 0.001", "OPRD, lr 0.003"]
    assert metrics_table(runs)["label"].nunique() == 2


def test_set_scores_weigh_sets_and_know_the_teacher(tmp_path):
    folder = synthetic_run(tmp_path / "run", steps=10, problems=20)
    teacher = pd.DataFrame({"set": ["x", "x", "y"], "problem": [0, 1, 0], "correct": [True, False, True]})
    teacher.to_parquet(folder / "eval" / "teacher.parquet")
    scores = set_scores(folder)
    assert scores["method"].unique().tolist() == ["Teacher", "Student", "OPRD"]
    assert scores[scores["method"] == "Teacher"].set_index("set")["avg"].to_dict() == {"x": 50.0, "y": 100.0}


def test_a_sweep_needs_mu_in_every_run(tmp_path):
    runs = [
        synthetic_run(tmp_path / "a", steps=5, problems=5, mu=1),
        synthetic_run(tmp_path / "b", steps=5, problems=5),
    ]
    with pytest.raises(ValueError, match=r"\['b'\] has no 'mu'"):
        mu_table(runs)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: metrics_table([]), "nothing to draw"),
        (lambda: metrics_table(pd.DataFrame({"step": [1]})), "'method'"),
        (lambda: summary_table(pd.DataFrame({"method": ["oprd"]})), "'accuracy'"),
    ],
)
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_methods_look_different_and_come_from_the_palette():
    colours = [style.colour for style in METHODS.values()]
    assert len(set(colours)) == len(colours)
    assert set(colours) <= {*OKABE_ITO.values(), *TOL_MUTED.values()}
    assert len({style.symbol for style in METHODS.values()}) == len(METHODS)


def test_a_large_run_opens_in_three_seconds(tmp_path):
    folder = synthetic_run(tmp_path / "large", "oprd", steps=5000, problems=1250, samples=16)
    start = time.perf_counter()
    run = read_run(folder)
    table = summary_table(run)
    taken = time.perf_counter() - start
    assert len(run.metrics) == 5000
    assert table["accuracy"].notna().all()
    assert len(run.evals.grades("after")) == 20_000
    assert taken <= 3, f"took {taken:.1f} s"


# ---- one rule for memory, one name for every run


def test_memory_is_known_only_where_an_accelerator_counted_it(tmp_path):
    on_card = synthetic_run(tmp_path / "card", steps=20, problems=5, about={"device": "NVIDIA H100"})
    on_cpu = synthetic_run(tmp_path / "cpu", steps=20, problems=5, about={"device": "CPU, 2 cores"})
    assert final_metrics(read_run(on_card))["delta_peak"] == 9.5e7
    assert np.isnan(final_metrics(read_run(on_cpu))["delta_peak"])
    for folder, has_memory in ((on_card, True), (on_cpu, False)):
        summary = json.loads(write_summary(folder, {}, seconds=1.0, steps=20).read_text())
        assert ("memory/delta_peak" in summary) == has_memory


def test_the_first_three_steps_do_not_count_as_the_peak():
    assert peak_memory([9.0, 9.0, 9.0, 1.0, 2.0, np.nan], on_cpu=False) == 2.0
    assert peak_memory([9.0, 1.0], on_cpu=False) == 9.0
    assert np.isnan(peak_memory([], on_cpu=False))


@dataclass
class OwnTerm(Term):
    positions: str = "all"
    name = "own"
    predicting = True
    needs_head = True

    def per_position(self, inputs):
        raise NotImplementedError


@pytest.mark.parametrize(
    ("objective", "method", "label"),
    [
        (Representation(), "oprd", "OPRD"),
        (SampledTokenKL() + 10 * Representation(), "opd-sampled", "OPD sampled token + 10 OPRD"),
        (OwnTerm(), "OwnTerm", "OwnTerm"),
        (0.5 * OwnTerm() + FullKL(), "OwnTerm", "0.5 OwnTerm + OPD full KL"),
    ],
)
def test_every_objective_has_a_method_and_a_label(objective, method, label):
    assert method_and_label(as_objective(objective)) == (method, label)
