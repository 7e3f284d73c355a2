"""Figures: the same colour for the same method everywhere, honest smoothing, axes, overlays, errors."""

import subprocess
import sys

import numpy as np
import pandas as pd
import plotly.io
import pytest
from hypothesis import given
from hypothesis import strategies as st

from oprd_nb import plots
from oprd_nb.evaluation import Evaluation, compare
from oprd_nb.plots.curves import accuracy_curve, layer_cosine, layer_heatmap, length_curve
from oprd_nb.plots.evaluations import plot_evaluations
from oprd_nb.plots.lines import rolling_mean
from oprd_nb.plots.outcomes import mu_sweep, pareto_bubble, position_cosine, rank_cosine
from oprd_nb.plots.paper import PAPER_TABLES, paper_table
from oprd_nb.plots.tables import best_cells
from oprd_nb.runs import METHODS, RunPaths, metric_of, metrics_table, read_run, summary_table, synthetic_run
from oprd_nb.runs.synthetic import SHAPES
from oprd_nb.utils import small_png

CURVES = {
    "accuracy_curve": "eval/avg@1",
    "length_curve": "response_length/mean",
    "cosine_curve": "rep/cosine_similarity",
    "pg_loss_curve": "actor/pg_loss",
    "overlap_curve": "topk/overlap_ratio",
    "entropy_curves": "actor/entropy",
    "snr_curve": "grad/snr",
}
TABLES = {
    "accuracy_table": 2,
    "cost_table": 3,
    "cross_architecture_table": 4,
    "diversity_table": 5,
    "cross_tokenizer_table": 6,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        synthetic_run(folder / f"{method}-{seed}", method, seed, steps=60, problems=40)
        for method in SHAPES
        for seed in (0, 1)
    ]


@given(st.floats(-5, 5), st.floats(-5, 5), st.integers(1, 60), st.sampled_from([1, 3, 5, 9, 21]))
def test_a_straight_line_is_left_as_it_is(slope, start, points, window):
    line = start + slope * np.arange(points)
    assert np.allclose(rolling_mean(line, window), line, atol=1e-8)


@given(st.lists(st.floats(-1e3, 1e3), min_size=9, max_size=40), st.sampled_from([3, 5, 7, 9]))
def test_the_middle_is_a_plain_mean(values, window):
    half = window // 2
    got = rolling_mean(np.array(values), window)
    assert len(got) == len(values)
    for i in range(half, len(values) - half):
        assert got[i] == pytest.approx(np.mean(values[i - half : i + half + 1]), abs=1e-6)


@pytest.mark.parametrize("window", [0, -3, 4])
def test_an_even_window_is_refused(window):
    with pytest.raises(ValueError, match=f"smooth={window}"):
        rolling_mean(np.arange(5.0), window)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("axis", ["step", "seconds"])
def test_every_curve_has_the_methods_colours_and_units(runs, name, axis):
    fig = getattr(plots, name)(runs, axis=axis)
    labels = {METHODS[method].label: METHODS[method].colour for method in SHAPES}
    for trace in fig.data:
        colour = trace.line.color if trace.mode == "lines" else trace.marker.color
        assert colour == labels[trace.name.split(",")[0]]
    assert {trace.name.split(",")[0] for trace in fig.data} == set(labels)
    titles = {"step": "Training step", "seconds": "Training time, seconds"}
    assert fig.layout.xaxis.title.text == titles[axis]
    assert fig.layout.yaxis.title.text


@pytest.mark.parametrize("name", sorted(CURVES.keys() - {"snr_curve"}))
def test_the_y_axis_is_that_of_the_metrics_table(runs, name):
    assert getattr(plots, name)(runs).layout.yaxis.title.text == metric_of(CURVES[name]).axis


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_from_a_tidy_table_is_the_curve_from_folders(runs, name):
    read = [read_run(run) for run in runs[:4]]
    table = pd.concat([run.metrics.assign(method=run.method) for run in read], ignore_index=True)
    draw = getattr(plots, name)
    one = draw(table)
    other = draw(runs[:4])
    assert [trace.name for trace in one.data] == [trace.name for trace in other.data]
    for a, b in zip(one.data, other.data, strict=True):
        assert np.array_equal(a.x, b.x)
        assert np.array_equal(a.y, b.y)


@pytest.mark.parametrize("name", CURVES)
def test_a_metric_that_nobody_logged_is_an_error_that_lists_what_was(runs, name):
    table = metrics_table(runs[:2])[["method", "step", "seconds", "loss", "rep/cosine_layer_1"]]
    with pytest.raises(ValueError, match=r"rep/cosine_layer_1|eval/avg@k"):
        getattr(plots, name)(table)


def test_a_line_is_the_mean_over_seeds(runs):
    table = metrics_table(runs[:2])
    line = accuracy_curve(runs[:2], smooth=1).data[1]
    assert np.allclose(line.y, table.groupby("step")["eval/avg@1"].mean().dropna(), atol=1e-6)


def test_labels_of_one_method_share_its_colour_and_differ_in_dash(tmp_path):
    runs = [
        synthetic_run(tmp_path / str(mu), "oprd", steps=20, problems=5, about={"label": f"μ = {mu}"})
        for mu in (1, 10)
    ]
    lines = [trace for trace in accuracy_curve(runs).data if trace.mode == "lines"]
    assert len({line.line.color for line in lines}) == 1
    assert len({line.line.dash for line in lines}) == 2


def test_an_unknown_axis_and_an_unknown_benchmark_are_refused(runs):
    with pytest.raises(ValueError, match="axis='hours'"):
        accuracy_curve(runs, axis="hours")
    with pytest.raises(ValueError, match="paper='AIME26'"):
        accuracy_curve(runs, paper="AIME26")


def test_long_runs_are_drawn_in_hours_and_thinned():
    table = pd.DataFrame(
        {
            "method": "oprd",
            "step": range(5000),
            "seconds": np.arange(5000) * 10.0,
            "response_length/mean": 1.0,
        }
    )
    fig = length_curve(table, axis="seconds")
    assert fig.layout.xaxis.title.text == "Training time, hours"
    assert max(len(trace.x) for trace in fig.data) <= 100
    assert fig.data[1].x[-1] == pytest.approx(49990 / 3600)


def test_the_bubbles_area_is_memory_and_its_place_accuracy_and_time(runs):
    table = summary_table(runs)
    fig = pareto_bubble(runs)
    for trace, row in zip(fig.data, table.itertuples(), strict=True):
        assert (trace.x[0], trace.y[0], trace.marker.size[0]) == pytest.approx(
            (row.seconds, row.accuracy, row.delta_peak)
        )
        assert trace.marker.sizemode == "area"
        assert trace.marker.color == METHODS[row.method].colour
    assert fig.layout.xaxis.title.text == "Training time, seconds"


def test_a_label_is_next_to_its_bubble_on_a_log_axis_too(runs):
    fig = pareto_bubble(runs, paper=True)
    bubbles = {trace.name: trace.x[0] for trace in fig.data}
    assert fig.layout.xaxis.type == "log"
    for note in fig.layout.annotations[: len(SHAPES)]:
        label = note.text.removeprefix("<b>").split("</b>")[0]
        # plotly takes the place of an annotation on a log axis as a logarithm.
        assert 10**note.x == pytest.approx(bubbles[label])


def test_a_method_that_adds_no_memory_has_a_bubble_that_can_be_seen():
    table = pd.DataFrame(
        {
            "method": ["oprd", "opd-full"],
            "accuracy": [0.5, 0.4],
            "seconds": [9.0, 9.0],
            "delta_peak": [1e8, 0.0],
        }
    )
    sizes = [trace.marker.size[0] for trace in pareto_bubble(table).data]
    assert sizes[0] == 1e8
    assert 0 < sizes[1] < 2e6


def test_runs_without_memory_or_without_evaluation(tmp_path):
    table = pd.DataFrame({"method": ["oprd", "opd-full"], "accuracy": [0.5, 0.4], "seconds": [10.0, 20.0]})
    fig = pareto_bubble(table)
    assert "MB" not in fig.data[0].text
    labels = [note.text.split("<br>")[0] for note in fig.layout.annotations]
    assert labels == ["<b>OPD full KL</b>", "<b>OPRD</b>"]
    (tmp_path / "config.yaml").write_text("method: oprd\n")
    with pytest.raises(ValueError, match="after.parquet"):
        pareto_bubble(tmp_path)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_labels_of_bubbles_never_overlap(accuracies):
    table = pd.DataFrame(
        {
            "method": "oprd",
            "label": [f"run {i}" for i in range(len(accuracies))],
            "accuracy": accuracies,
            "seconds": 10.0,
        }
    )
    heights = [note.ay for note in pareto_bubble(table).layout.annotations]
    assert all(above - below >= 0.169 for below, above in zip(heights, heights[1:], strict=False))
    assert heights[-1] <= 0.97


def test_layers_are_true_numbers(runs):
    fig = layer_cosine(runs[:2])
    assert [list(trace.x) for trace in fig.data] == [[1, 2, 3, 4]] * 2
    heat = layer_heatmap(runs[:2]).data[0]
    assert list(heat.y) == [1, 2, 3, 4]
    assert heat.z.shape[0] == 4
    with pytest.raises(ValueError, match="one label"):
        layer_heatmap(runs)


def test_the_papers_numbers_are_added(runs):
    assert {trace.name for trace in length_curve(runs[:1], paper=True).data[2:]} == {
        "OPRD, paper: 5,700 tokens",
        "OPD top-1, paper: 7,000 tokens",
    }
    points = {trace.name.split(",")[0]: trace.y[0] for trace in pareto_bubble(runs[:1], paper=True).data[1:]}
    assert points == pytest.approx({"OPD top-1": 0.423, "OPD top-16": 0.471, "OPRD": 0.498})
    sweep = mu_sweep(pd.DataFrame({"mu": [3.0], "accuracy": [0.5]}), paper=True)
    assert sweep.data[1].y == (0.423, 0.477, 0.502)
    assert sweep.layout.xaxis.categoryarray == ("0", "1", "3", "10")


def test_tidy_tables_are_checked():
    with pytest.raises(ValueError, match="'side'"):
        position_cosine(pd.DataFrame({"k": [1], "cosine": [1.0]}))
    with pytest.raises(ValueError, match="side=.*middle"):
        position_cosine(pd.DataFrame({"k": [1], "cosine": [1.0], "side": ["middle"]}))
    with pytest.raises(ValueError, match="'r2'"):
        rank_cosine(pd.DataFrame({"layer": [1], "rank": [1], "cosine": [1.0]}))


@pytest.mark.parametrize("name, number", TABLES.items())
def test_tables_hold_the_papers_rows_and_ours(runs, name, number):
    draw = getattr(plots, name)
    paper = draw()
    both = draw(runs)
    methods = len(PAPER_TABLES[number][1])
    assert len(paper.data[0].cells.values[0]) == methods
    assert set(paper.data[0].cells.values[0]) == {"paper"}
    assert list(both.data[0].cells.values[0]).count("ours") >= len(SHAPES)
    assert f"Table {number}" in both.layout.title.text


def test_the_best_trained_method_is_shaded():
    table = paper_table(2)
    assert table["method"][best_cells(table, "AIME24", "max")].tolist() == ["OPRD"]
    assert paper_table(3)["method"][best_cells(paper_table(3), "Δ-peak, GB", "min")].tolist() == ["OPRD"]
    assert not best_cells(paper_table(5), "Length", None).any()
    with pytest.raises(ValueError, match="number=7"):
        paper_table(7)


def test_a_figure_carries_its_own_small_theme(runs):
    fig = accuracy_curve(runs[:1])
    assert fig.layout.paper_bgcolor is None
    assert fig.layout.template.layout.paper_bgcolor == "white"
    assert len(fig.to_json()) < 6000


def test_importing_the_theme_changes_nothing_in_plotly():
    check = (
        "import plotly.io as pio; templates = set(pio.templates); renderers = set(pio.renderers); "
        "default = pio.templates.default; import oprd_nb.plots.theme; "
        "assert set(pio.templates) == templates and set(pio.renderers) == renderers; "
        "assert pio.templates.default == default"
    )
    subprocess.run([sys.executable, "-c", check], check=True)


def test_a_machine_without_a_browser_shows_figures_without_pictures(monkeypatch):
    def no_browser(*args, **kwargs):
        raise RuntimeError("Kaleido requires Google Chrome to be installed.")

    monkeypatch.setattr(plotly.io, "to_image", no_browser)
    with pytest.warns(UserWarning, match="plotly_get_chrome"):
        assert small_png({}) == {}


# ---- two evaluations


def test_two_evaluations_have_their_intervals_and_their_difference(tmp_path):
    folder = synthetic_run(tmp_path / "run", "oprd", steps=5, problems=40, samples=4)
    before, after = (Evaluation.load(RunPaths(folder).eval(name)) for name in ("before", "after"))
    fig = plot_evaluations(before, after)
    for trace, result in zip(fig.data, (before, after), strict=True):
        table = result.summary.set_index("metric").loc[list(trace.y)]
        assert np.allclose(trace.x, table["value"])
        assert np.allclose(trace.x + trace.error_x.array, table["high"])
        assert (trace.x + trace.error_x.array).max() <= 1
        assert (trace.x - trace.error_x.arrayminus).min() >= 0
    row = compare(after, before, ["avg@4"]).iloc[0]
    assert f"avg@4: +{100 * row['difference']:.1f} points" in fig.layout.title.text
    other = Evaluation(after.samples.assign(prompt="another problem"), after.settings, after.ks)
    with pytest.raises(ValueError, match="other problems"):
        plot_evaluations(before, other)
