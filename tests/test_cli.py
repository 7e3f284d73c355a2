"""The command line: a wrong input is answered in one line with exit code 2, and leaves nothing behind."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from oprd_nb.bridge.base import BridgeMetadata, ModelSpec
from oprd_nb.bridge.pca import Bridge
from oprd_nb.bridge.readout import ReadoutBridge, load_bridge
from oprd_nb.capture import FINAL
from oprd_nb.cli import main
from oprd_nb.cli.demo import BEST_LEARNING_RATE
from oprd_nb.cli.dispatch import COMMANDS
from oprd_nb.cli.train import TrainArguments, objective_of, stages_of
from oprd_nb.core import Rollouts
from oprd_nb.runs import mu_table, read_run
from oprd_nb.runs.tables import final_metrics
from oprd_nb.structure.moments import Moments
from oprd_nb.training.config import OPRDConfig
from oprd_nb.training.experiment import bridge_term

SHORT = [
    "--max_steps",
    "2",
    "--max_completion_length",
    "40",
    "--bf16",
    "False",
    "--per_device_train_batch_size",
    "8",
    "--gradient_accumulation_steps",
    "1",
    "--use_cpu",
    "True",
    "--save_strategy",
    "no",
    "--learning_rate",
    "1e-3",
]


def train(folder, *changes, student="embedded/student", teacher="embedded/teacher", prompts="arithmetic"):
    return main(
        [
            "train",
            "--student",
            student,
            "--teacher",
            teacher,
            "--prompts",
            str(prompts),
            "--output_dir",
            str(folder / "run"),
            *SHORT,
            *changes,
        ]
    )


def test_every_command_lists_its_settings(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as stop:
            main([name, "--help"])
        assert stop.value.code == 0 and "--" in capsys.readouterr().out


def test_train_writes_a_whole_run_folder(tmp_path, capsys):
    assert train(tmp_path, "--test", "arithmetic", "--samples", "1") == 0
    folder = tmp_path / "run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert yaml.safe_load((folder / "config.yaml").read_text())["method"] == "oprd"
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        0
        <= summary["before/avg@1"]["low"]
        <= summary["before/avg@1"]["value"]
        <= summary["before/avg@1"]["high"]
        <= 1
        and summary["steps"] == 2
    )
    assert len(pd.read_parquet(folder / "eval" / "after.parquet")) == 200
    said = capsys.readouterr().out.splitlines()
    assert said[-2].startswith("run folder:")
    # The last line is a command that works as it is printed.
    assert said[-1].startswith("next: oprd report ")
    assert main(shlex.split(said[-1].removeprefix("next: oprd "))) == 0
    assert Path(shlex.split(said[-1])[-1]).is_file()
    assert (
        main(["report", "--runs", str(folder), "--out", str(tmp_path / "report.html")]) == 0
        and (tmp_path / "report.html").stat().st_size > 10_000
    )


def test_the_same_command_again_starts_afresh(tmp_path):
    for _ in range(2):
        assert train(tmp_path, "--test", "arithmetic", "--samples", "1", "--learning_rate", "1e-3") == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) < 6


@pytest.mark.parametrize(
    "method, mu, names",
    [
        ("oprd", 0, ["rep"]),
        ("opd-full", 0, ["full"]),
        ("opd-topk", 0, ["topk"]),
        ("opd-sampled", 10, ["sampled", "rep"]),
    ],
)
def test_methods_by_name(method, mu, names):
    objective = objective_of(method, TrainArguments("s", "t", "p", method=method, mu=mu, layers="last"))
    assert [term.name for _, term in objective.terms] == names and (not mu or objective.terms[-1][0] == mu)


def test_bridge_writes_a_folder_that_train_reads(tmp_path, capsys):
    asked = [
        "bridge",
        "embedded/student",
        "embedded/teacher_wide",
        "--limit",
        "128",
        "--max_new_tokens",
        "40",
        "--rank",
        "4",
        "--out",
        str(tmp_path / "bridge"),
    ]
    assert main(asked) == 0 and "first 4 components" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "bridge").iterdir()} == {
        "bridge.safetensors",
        "scores.csv",
        "report.html",
        "about.json",
    }
    assert (
        train(
            tmp_path,
            "--method",
            "bridge",
            "--bridge",
            str(tmp_path / "bridge"),
            teacher="embedded/teacher_wide",
        )
        == 0
    )
    kept = [load_bridge(tmp_path / folder) for folder in ("bridge", "run")]
    assert kept[0].header == kept[1].header and all(
        torch.equal(kept[0].tensors[name], kept[1].tensors[name]) for name in kept[0].tensors
    )


@pytest.mark.filterwarnings("ignore:only .* of the student's tokens")
def test_two_stages_in_one_command(tmp_path, capsys):
    """The paper's recipe: a bridge fitted on the way, then the sampled token, which trains the head too."""
    assert (
        train(
            tmp_path,
            "--method",
            "bridge",
            "--then",
            "opd-sampled",
            "--then_learning_rate",
            "1e-4",
            "--limit",
            "128",
            "--test",
            "arithmetic",
            "--samples",
            "1",
            teacher="embedded/teacher_wide",
        )
        == 0
    )
    second = tmp_path / "run"
    first = second / "1-bridge"
    assert (
        f"stages: 1 steps of bridge (in {first}), then 1 of opd-sampled: 2 in all" in capsys.readouterr().out
    )
    settings = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second)]
    assert [s["method"] for s in settings] == ["bridge", "opd-sampled"] and [
        s["learning_rate"] for s in settings
    ] == [1e-3, 1e-4]
    assert load_bridge(first).rank == 8 and not (second / "bridge.safetensors").exists()
    after, before = (
        pd.read_parquet(path)
        for path in (first / "eval" / "after.parquet", second / "eval" / "before.parquet")
    )
    assert after.response.equals(before.response)  # the second stage starts from the first one's student
    whole, *parts = [final_metrics(read_run(folder)) for folder in (second, first)]
    assert whole["updates"] == 2 and parts[0]["updates"] == 1
    assert whole["before"] == parts[0]["before"] and whole["rollout_tokens"] > parts[0]["rollout_tokens"] > 0
    assert whole["seconds"] > parts[0]["seconds"]


def test_two_stages_share_the_steps():
    asked = TrainArguments("s", "t", "p", method="bridge", then="opd-sampled")
    split = [config.max_steps for _, config in stages_of(asked, OPRDConfig("runs/a", max_steps=7))]
    assert split == [4, 3]
    asked.then_steps = 5
    (_, first), (request, last) = stages_of(asked, OPRDConfig("runs/a", max_steps=7))
    assert (first.max_steps, last.max_steps, request.then_steps) == (2, 5, 0)
    asked.then_steps = 7
    with pytest.raises(ValueError, match="then_steps=7: leaves no step of max_steps=7"):
        stages_of(asked, OPRDConfig("runs/a", max_steps=7))
    with pytest.raises(ValueError, match="max_steps=1: --then needs a step for each stage"):
        stages_of(asked, OPRDConfig("runs/a", max_steps=1))


@pytest.mark.filterwarnings("ignore:only .* of the student's tokens")
def test_a_readout_is_fitted_on_the_way(tmp_path):
    assert train(tmp_path, "--method", "readout", "--limit", "256", teacher="embedded/teacher_tokens") == 0
    assert load_bridge(tmp_path / "run").offsets == (0, 1)


def foreign_bridge(folder):
    """A bridge from the embedded student to a teacher of width 7."""
    moments = Moments([(layer, layer) for layer in (1, 2, 3, 4)], 96, 7)
    for pair in moments.layer_pairs:
        moments.update(pair, torch.randn(50, 96), torch.randn(50, 7))
    return Bridge.fit(moments, rank=2).save(folder / "foreign")


def test_a_readout_asks_for_the_state_and_a_bridge_for_its_direction(tmp_path):
    readout = ReadoutBridge(
        BridgeMetadata([(4, FINAL)], ModelSpec(96), ModelSpec(7), 96, "KL", 0),
        {"weight": torch.zeros(1, 96, 7), "bias": torch.zeros(1, 96)},
    )
    assert [bridge_term(made).distance for made in (readout, load_bridge(foreign_bridge(tmp_path)))] == [
        "mse",
        "normalized_mse",
    ]
    assert (
        bridge_term(readout, distance="cosine").distance == "cosine"
        and bridge_term(readout, layers="all").layers == "last"
        and bridge_term(readout).predicting
    )


def test_a_student_learns_from_its_own_base(tmp_path):
    """Asked the same, the base with adapters of zero has nothing to teach; asked otherwise, it has."""
    losses = {}
    for name, changes in {"same question": [], "another": ["--teacher_prompt", "1+1=2 {}"]}.items():
        assert train(tmp_path / name, "--lora", "4", *changes, teacher="base") == 0
        losses[name] = json.loads((tmp_path / name / "run" / "metrics.jsonl").read_text().splitlines()[0])[
            "loss"
        ]
    assert losses["same question"] < 1e-6 < losses["another"]


def test_mu_is_recorded_for_a_sweep(tmp_path):
    for mu in ("0", "10"):
        assert (
            train(
                tmp_path / mu, "--method", "opd-sampled", "--mu", mu, "--test", "arithmetic", "--samples", "1"
            )
            == 0
        )
    assert mu_table([tmp_path / mu / "run" for mu in ("10", "0")])["mu"].tolist() == [0, 10]


def bad_inputs(folder):
    pd.DataFrame({"question": ["1+1"], "answer": ["2"]}).to_parquet(folder / "no_prompt.parquet")
    (folder / "torn.safetensors").write_bytes(b"torn")
    stored = Rollouts.from_ids([[4, 7, 2, 5]], [[7, 2]], 0)
    Rollouts(stored.input_ids, stored.attention_mask, stored.response_mask & False).save(
        folder / "empty.safetensors"
    )
    return {
        "an unknown layer": (dict(changes=["--layers", "9"]), "layers='9'", "layers 1 to 4"),
        "an empty response": (
            dict(changes=["--replay", str(folder / "empty.safetensors")]),
            "response",
            "empty",
        ),
        "no prompt column": (dict(prompts=folder / "no_prompt.parquet"), "no_prompt.parquet", "prompt"),
        "a missing prompts file": (dict(prompts=folder / "missing.parquet"), "missing.parquet", "parquet"),
        "a missing student": (dict(student="no/such-model"), "model='no/such-model'", "give a model folder"),
        "a missing teacher": (dict(teacher=str(folder / "nowhere")), "nowhere", "give a model folder"),
        "a tokenizer that does not fit": (
            dict(teacher="embedded/teacher_tokens", changes=["--method", "opd-full"]),
            "different tokenizers",
            "bridge",
        ),
        "a student's tokenizer that does not fit": (
            dict(changes=["--student_tokenizer", "embedded/teacher_tokens"]),
            "tokenizer",
            "own tokenizer",
        ),
        "another width": (dict(teacher="embedded/teacher_wide"), "bridge=None", "fit a bridge"),
        "an unknown method": (dict(changes=["--method", "magic"]), "method='magic'", "use one of"),
        "an unknown distance": (dict(changes=["--distance", "l3"]), "distance='l3'", "use one of"),
        "unknown positions": (dict(changes=["--positions", "end"]), "positions='end'", "use 'all'"),
        "mu beside a bridge": (dict(changes=["--method", "bridge", "--mu", "1"]), "mu=1.0", "output-space"),
        "a bridge for another method": (
            dict(changes=["--bridge", str(folder)]),
            "bridge=",
            "only the methods",
        ),
        "a bridge that is none": (
            dict(changes=["--method", "readout", "--bridge", str(folder / "torn.safetensors")]),
            "torn.safetensors",
            "oprd bridge",
        ),
        "a bridge for other models": (
            dict(changes=["--method", "bridge", "--bridge", str(foreign_bridge(folder))]),
            "fitted for another teacher",
            "fit one",
        ),
        "torn rollouts": (
            dict(changes=["--replay", str(folder / "torn.safetensors")]),
            "torn.safetensors",
            "Rollouts.save",
        ),
        "a base without adapters": (dict(teacher="base"), "teacher='base'", "--lora"),
        "generations that do not divide": (
            dict(changes=["--num_generations", "3"]),
            "num_generations=3",
            "change per_device",
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        "an unknown layer",
        "an empty response",
        "no prompt column",
        "a missing prompts file",
        "a missing student",
        "a missing teacher",
        "a tokenizer that does not fit",
        "a student's tokenizer that does not fit",
        "another width",
        "an unknown method",
        "an unknown distance",
        "unknown positions",
        "torn rollouts",
        "generations that do not divide",
        "a base without adapters",
        "mu beside a bridge",
        "a bridge for another method",
        "a bridge that is none",
        "a bridge for other models",
    ],
)
def test_bad_input_is_one_line(case, tmp_path, capsys):
    options, named, way_out = bad_inputs(tmp_path)[case]
    assert train(tmp_path, *options.pop("changes", []), **options) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("oprd train: ")]
    assert len(lines) == 1 and "Traceback" not in error and named in lines[0] and way_out in lines[0], error
    assert not (tmp_path / "run").exists()


def test_bad_input_in_a_real_process(tmp_path):
    """The installed command, as a shell sees it."""
    command = [
        os.path.join(os.path.dirname(sys.executable), "oprd"),
        "eval",
        "--models",
        "no/such-model",
        "--task",
        "aime24",
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    assert (
        done.returncode == 2
        and "Traceback" not in done.stderr
        and len(done.stderr.strip().splitlines()) == 1
        and not list(tmp_path.iterdir())
    )


def test_unknown_flags_and_commands():
    assert main(["magic"]) == 2 and main([]) == 2
    assert main(["demo", "--magic", "1"]) == 2


def test_evaluates_models_side_by_side(tmp_path, capsys):
    asked = [
        "eval",
        "--models",
        "embedded/student",
        "embedded/teacher",
        "--task",
        "arithmetic",
        "--samples",
        "1",
        "--max_new_tokens",
        "40",
        "--limit",
        "20",
        "--out",
        str(tmp_path),
    ]
    assert (
        main([*asked, "--outside", "embedded/teacher_wide"]) == 2
        and "outside=['embedded/teacher_wide']" in capsys.readouterr().err
        and not list(tmp_path.iterdir())
    )
    assert main([*asked, "--outside", "embedded/teacher"]) == 0
    shown = capsys.readouterr().out
    assert (
        "embedded/student" in shown
        and "embedded/teacher" in shown
        and len(list(tmp_path.glob("*.parquet"))) == 2
    )
    rows = [line for line in shown.splitlines() if line.startswith("| ")]
    assert len(rows) == 4
    bars = {tuple(i for i, letter in enumerate(row) if letter == "|") for row in rows}
    assert len(bars) == 1


def test_demo_uses_the_learning_rates_the_sweep_found():
    from check_sync import ROOT

    table = pd.read_csv(ROOT / "nbs" / "results" / "same_sweep.csv")
    for method, rows in table.groupby("method"):
        rates, best = sorted(rows.learning_rate), rows.loc[rows.accuracy.idxmax(), "learning_rate"]
        assert (
            BEST_LEARNING_RATE[method] == pytest.approx(best)
            and len(rates) >= 5
            and best not in (rates[0], rates[-1])
        )


def test_a_run_is_resumed_exported_and_evaluated(tmp_path, capsys):
    """Two of four steps, then the rest by --resume, then a plain model folder that `oprd eval` loads."""
    steps = ["--save_strategy", "steps", "--save_steps", "2"]
    assert train(tmp_path, *steps, "--lora", "4") == 0
    assert train(tmp_path, *steps, "--lora", "4", "--max_steps", "4", "--resume", "true") == 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4]
    assert main(["export", str(tmp_path / "run")]) == 0 and "model:" in capsys.readouterr().out
    assert (
        main(
            [
                "eval",
                str(tmp_path / "run" / "export"),
                "--task",
                "arithmetic",
                "--samples",
                "1",
                "--max_new_tokens",
                "40",
                "--limit",
                "5",
                "--out",
                str(tmp_path / "eval"),
            ]
        )
        == 0
    )
    assert {path.suffix for path in (tmp_path / "eval").iterdir()} == {".parquet", ".md", ".tex", ".csv"}
    assert main(["export", str(tmp_path / "nowhere")]) == 2


def test_bench_prints_and_stores(tmp_path, capsys):
    assert main(["bench", "bridge", "--tiny", "true", "--out", str(tmp_path)]) == 0
    assert "share" in capsys.readouterr().out and (tmp_path / "bridge.json").exists()
    assert main(["bench", "magic"]) == 2


def test_readmes_sequence_ends_in_a_whole_report(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    short = "--max_steps 2 --max_completion_length 40 --per_device_train_batch_size 8 --num_generations 1"
    short += " --gradient_accumulation_steps 1 --bf16 False --use_cpu True --save_steps 2 --disable_tqdm True"
    train = "train embedded/student embedded/teacher arithmetic --limit 16 --output_dir run --samples 1"
    assert main([*train.split(), *short.split()]) == 0
    said = capsys.readouterr().err
    assert "no --test" in said
    assert "no --validation" in said
    # What is missing can still be added, model by model.
    for model in ("embedded/student", "run", "embedded/teacher"):
        evaluate = f"eval {model} --task arithmetic --limit 8 --samples 1 --max_new_tokens 40 --into run"
        assert main(evaluate.split()) == 0
    assert main(["report", "run", "--out", "page.html"]) == 0
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "The teacher answers" in page
    assert page.count("<article data-spaced") == 8
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {"avg@1", "before/avg@1", "teacher/avg@1", "seconds"} <= set(summary)
    assert main("eval smollm2 --task arithmetic --into run".split()) == 2
    assert "neither a checkpoint" in capsys.readouterr().err
