"""Every figure and table from the stored copies of real runs: their traces, colours, units and ranges."""

from pathlib import Path

import numpy as np
import pytest

from oprd_nb import plots
from oprd_nb.plots.curves import layer_cosine, layer_heatmap, pg_loss_curve
from oprd_nb.plots.outcomes import mu_sweep, pareto_bubble
from oprd_nb.runs import METHODS, mu_table, read_run, summary_table

STORED = Path(__file__).parent.parent / "nbs" / "results" / "figures"
NAMES = ("oprd", "opd-full", "opd-topk", "opd-sampled")


@pytest.fixture(scope="module")
def runs():
    return [read_run(STORED / name) for name in NAMES]


@pytest.mark.parametrize(
    "name, y, low, high",
    [
        ("accuracy_curve", "Accuracy (Avg@1)", 0, 1),
        ("length_curve", "Tokens per response", 5, 40),
        ("cosine_curve", "Cosine, student and teacher", 0.5, 1),
        ("overlap_curve", "Share of top-k tokens in common", 0, 1),
        ("entropy_curves", "Entropy, nats per token", 0, 3.2),
        ("snr_curve", "Signal-to-noise (log scale)", -np.inf, np.inf),
    ],
)
def test_a_curve_of_every_method(runs, name, y, low, high):
    fig = getattr(plots, name)(runs)
    assert {trace.line.color for trace in fig.data if trace.mode == "lines"} == {
        METHODS[name].colour for name in NAMES
    }
    assert fig.layout.yaxis.title.text == y
    assert fig.layout.xaxis.title.text == "Training step"
    for trace in fig.data:
        assert trace.x.min() >= 0
        assert trace.x.max() == 200
        assert not (trace.y < low).any()
        assert not (trace.y > high).any()


def test_the_policy_gradient_loss_of_the_method_that_has_one(runs):
    fig = pg_loss_curve(runs[3])
    assert fig.layout.yaxis.title.text == "Loss, nats per token"
    colours = {trace.marker.color or trace.line.color for trace in fig.data}
    assert colours == {METHODS["opd-sampled"].colour}
    with pytest.raises(ValueError, match="actor/pg_loss"):
        pg_loss_curve(runs[0])


def test_signal_and_noise_are_as_the_theorem_has_them_at_the_start(runs):
    first = {run.method: run.metrics["grad/snr"].dropna().iloc[:10].median() for run in runs}
    assert first["oprd"] > 2 * first["opd-full"] > 2 * first["opd-sampled"]


def test_layers(runs):
    fig = layer_cosine(runs[:2])
    assert [list(trace.x) for trace in fig.data] == [[1, 2, 3, 4]] * 4
    assert all(0 < y <= 1 for trace in fig.data for y in trace.y)
    grid = layer_heatmap(runs[0]).data[0]
    assert grid.z.shape[0] == 4
    assert grid.x[-1] == 200
    assert grid.colorbar.title.text == "Cosine"


def test_a_bubble_is_where_its_run_ended(runs):
    fig = pareto_bubble(runs)
    table = summary_table(runs).set_index("label")
    for trace in fig.data:
        assert trace.y[0] == table.accuracy[trace.name]
        assert trace.marker.color == METHODS[table.method[trace.name]].colour
    assert fig.layout.yaxis.tickformat == ".0%"
    assert fig.layout.xaxis.title.text.startswith("Training time, ")


def test_a_sweep_of_three_seeds_a_weight():
    folders = list(STORED.glob("mu-*"))
    table = mu_table(folders)
    assert len(folders) == 12
    assert table["mu"].tolist() == [0, 1, 10, 100]
    assert (table["low"] <= table["accuracy"]).all()
    assert (table["accuracy"] <= table["high"]).all()
    fig = mu_sweep(folders, paper=True)
    assert fig.layout.xaxis.categoryarray == ("0", "1", "10", "100")
    assert [trace.name for trace in fig.data] == ["these runs", "paper, AIME24"]


@pytest.mark.parametrize(
    "name, folders, rows",
    [
        ("accuracy_table", NAMES, 5),
        ("cost_table", NAMES, 4),
        ("diversity_table", NAMES, 4),
        ("cross_architecture_table", ("wide-bridge", "wide-readout"), 3),
        ("cross_tokenizer_table", ("tokens-bridge", "tokens-readout"), 3),
    ],
)
def test_tables_hold_the_papers_rows_and_ours(name, folders, rows):
    (table,) = getattr(plots, name)([STORED / folder for folder in folders]).data
    source = list(table.cells["values"][0])
    assert source.count("ours") == rows
    assert source.count("paper") >= 3
    assert "–" not in list(table.cells["values"][-1])[-rows:]


def test_stored_runs_are_small_and_name_no_machine():
    files = [path for path in STORED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 900_000
    assert not any(
        b"/tmp" in path.read_bytes() or b"/home" in path.read_bytes()
        for path in files
        if path.suffix != ".parquet"
    )
