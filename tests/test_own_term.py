"""A term written after `help(Term)` and nothing else trains, is plotted and is reported."""

import json
import pydoc
import re
import textwrap

import pytest

from oprd_nb.cli.demo import embedded_config
from oprd_nb.models import embedded
from oprd_nb.objectives import Term
from oprd_nb.plots import accuracy_curve, write_report
from oprd_nb.runs import read_metrics, read_run
from oprd_nb.training.experiment import distil_pair


def term_of_help() -> type[Term]:
    """The class that `help(Term)` shows as an example."""
    text = re.sub(r"^ \|  ?", "", pydoc.plain(pydoc.render_doc(Term)), flags=re.M)
    start = text.index("class Nearer(Term):")
    line_start = text.rindex("\n", 0, start) + 1
    source = textwrap.dedent(text[line_start : text.index("`Nearer()`")]).strip()
    lines = [line for line in source.splitlines() if line.strip()]
    assert len(lines) <= 6
    names = {"Term": Term}
    exec("\n".join(lines), names)
    return names["Nearer"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    same = embedded("same")
    folder = tmp_path_factory.mktemp("own") / "run"
    args = embedded_config(folder, 1e-3, steps=24, seed=0, eval_steps=12)
    args.per_device_train_batch_size = 8
    validation = same.task.validation.select(range(6))
    distil_pair(same, term_of_help()(), args, {}, held_out=12, eval_dataset=validation)
    return folder


def test_it_trains(trained):
    losses = read_metrics(trained / "metrics.jsonl")["loss"].dropna()
    assert len(losses) == 24
    assert losses.gt(0).all()
    assert losses.iloc[-6:].mean() < 0.8 * losses.iloc[:6].mean()


def test_it_is_plotted_and_reported(trained, tmp_path):
    run = read_run(trained)
    assert (run.method, run.label) == ("Nearer", "Nearer")
    assert len(accuracy_curve([run]).data) > 0
    page = write_report([run], tmp_path / "report.html").read_text("utf-8")
    summary = json.loads((trained / "summary.json").read_text())
    assert "</span>Nearer" in page
    assert f"{100 * summary['avg@4']['value']:.1f}%" in page
