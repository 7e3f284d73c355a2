"""The dashboard: it reads only what is new, survives what runs do to their files, opens large runs at once, and follows a run in a browser."""

import json
import os
import threading
import time

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_explore import CHROMIUM, opened

from oprd_nb.explore.dashboard import RunDashboard, state_html
from oprd_nb.explore.watching import (
    PANELS,
    MetricsTail,
    WatchedRun,
    all_figures,
    has_data,
    panel_figure,
    run_dashes,
)
from oprd_nb.runs import METHODS, read_metrics, synthetic_metrics, synthetic_run

ROWS = st.lists(
    st.fixed_dictionaries(
        {"step": st.integers(0, 6)}, optional={"loss": st.floats(-1, 1), "eval/avg@1": st.floats(0, 1)}
    ),
    max_size=12,
)


def append(path, rows):
    with open(path, "a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


# ---- the tail of a file


@settings(max_examples=60, deadline=None)
@given(ROWS, st.integers(1, 60))
def test_the_tail_is_read_metrics_whatever_the_pieces(tmp_path_factory, rows, piece):
    log = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    text, tail = "".join(json.dumps(row) + "\n" for row in rows).encode(), MetricsTail(log)
    for end in [*range(0, len(text), piece), len(text)]:
        log.write_bytes(text[:end])
        tail.read()
    pd.testing.assert_frame_equal(tail.table(), read_metrics(log), check_dtype=False, check_like=True)


def test_each_byte_is_read_once(tmp_path):
    log = tmp_path / "metrics.jsonl"
    tail = MetricsTail(log)
    for row in synthetic_metrics("oprd", steps=200):
        append(log, [row])
        assert tail.read() and not tail.read()
    assert tail.bytes_read == log.stat().st_size and len(tail.rows) == 200


@pytest.mark.parametrize(
    "again",
    [[{"step": 1, "loss": 7.0}], [{"step": step, "loss": 7.0} for step in range(1, 90)]],
    ids=["shorter", "longer"],
)
def test_a_run_started_anew_is_read_anew(tmp_path, again):
    log = tmp_path / "metrics.jsonl"
    append(log, [{"step": step, "loss": 1.0} for step in range(1, 30)])
    tail = MetricsTail(log)
    tail.read()
    log.unlink()
    append(log, again)
    assert tail.read() and tail.table()["loss"].eq(7).all() and len(tail.rows) == len(again)
    log.unlink()
    assert tail.read() and not tail.rows and not tail.read()


def test_a_damaged_line_is_named(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\nnonsense\n')
    with pytest.raises(ValueError, match="nonsense") as caught:
        MetricsTail(log).read()
    assert "\n" not in str(caught.value)


# ---- panels


@pytest.fixture
def runs(tmp_path):
    watched = [
        WatchedRun(synthetic_run(tmp_path / f"{method}-{seed}", method, seed, steps=60, problems=20))
        for method in ("oprd", "opd-full")
        for seed in (0, 1)
    ]
    assert all(run.refresh() for run in watched)
    return watched


def test_runs_keep_their_methods_colour_and_differ_by_dash(runs):
    fig = panel_figure(PANELS["loss"], runs)
    lines = [trace for trace in fig.data if trace.mode == "lines"]
    assert [line.line.color for line in lines] == [
        METHODS[m].colour for m in ("oprd", "oprd", "opd-full", "opd-full")
    ]
    assert [line.line.dash for line in lines] == run_dashes(runs) == ["solid", "dash", "solid", "dash"]
    assert np.allclose(fig.data[0].y, runs[0].table["loss"], atol=1e-6)


def test_panels_say_their_units_and_axes(runs):
    figures = all_figures(runs, "seconds")
    assert set(figures) == {*PANELS, "time"} and all(map(has_data, figures.values()))
    assert figures["accuracy"].layout.yaxis.tickformat == ".0%" and figures["snr"].layout.yaxis.type == "log"
    assert figures["loss"].layout.xaxis.title.text == "Training time, seconds" and figures["loss"].data[0].x[
        -1
    ] == pytest.approx(runs[0].table["seconds"].max())
    parts = {bar.name: bar.x[0] for bar in figures["time"].data}
    assert parts == pytest.approx(
        {
            name.removeprefix("time/").replace("rollout", "rollouts"): runs[0].table[name].mean()
            for name in ("time/rollout", "time/teacher", "time/update")
        }
    )


def test_metrics_that_nobody_logged_leave_their_panel_away(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n')
    dashboard = RunDashboard(tmp_path)
    assert [name for name, frame in dashboard.frames.items() if frame.layout.display != "none"] == ["loss"]
    append(tmp_path / "metrics.jsonl", [{"step": 3, "eval/avg@4": 0.5}])
    assert dashboard.refresh() and dashboard.frames["accuracy"].layout.display != "none"


def test_names_cannot_become_markup(tmp_path):
    run = WatchedRun(
        synthetic_run(tmp_path / "<b>x", "oprd", steps=3, problems=4, about={"label": "<script>"})
    )
    run.refresh()
    page = state_html([run], trouble="<img>")
    assert "<b>" not in page and "<script>" not in page and "<img>" not in page


# ---- the dashboard


def test_it_shows_what_the_static_figures_show_after_any_refresh(tmp_path):
    folder = tmp_path / "run"
    dashboard = RunDashboard([folder, synthetic_run(tmp_path / "other", "opd-full", steps=40, problems=10)])
    folder.mkdir()
    (folder / "config.yaml").write_text("method: oprd\n")
    rows = synthetic_metrics("oprd", steps=40)
    for some in (rows[:10], rows[10:]):
        append(folder / "metrics.jsonl", some)
        assert dashboard.refresh() and not dashboard.refresh()
        for axis in ("seconds", "step"):
            dashboard.axis.value = axis
            for name, figure in all_figures(dashboard.runs, axis).items():
                for shown, wanted in zip(dashboard.figures[name].data, figure.data, strict=True):
                    assert (
                        np.array_equal(shown.x, wanted.x)
                        and np.array_equal(shown.y, wanted.y)
                        and shown.name == wanted.name
                    )
    assert dashboard.figures["loss"].data[1].line.color == METHODS["oprd"].colour


def test_a_damaged_file_is_told_and_the_rest_goes_on(tmp_path):
    good, bad = (
        synthetic_run(tmp_path / "good", steps=5, problems=5),
        synthetic_run(tmp_path / "bad", steps=5, problems=5),
    )
    dashboard = RunDashboard([bad, good])
    with open(bad / "metrics.jsonl", "a") as file:
        file.write("nonsense\n")
    append(good / "metrics.jsonl", [{"step": 6, "seconds": 9.0, "loss": 0.1}])
    assert (
        dashboard.refresh()
        and "nonsense" in dashboard.state.value
        and len(dashboard.figures["loss"].data[3].x) == 6
    )
    (bad / "config.yaml").write_text("method: [")
    dashboard.refresh()
    assert dashboard.trouble


def test_following_starts_stops_and_leaves_no_thread(tmp_path):
    before, dashboard = threading.active_count(), RunDashboard(tmp_path / "run")
    dashboard.start(every=0.02)
    dashboard.start(every=0.01)
    assert threading.active_count() == before + 1 and dashboard.live.value
    synthetic_run(tmp_path / "run", "readout", steps=12, problems=5)
    end = time.monotonic() + 20
    while "Readout" not in dashboard.state.value or len(dashboard.figures["loss"].data[1].x) < 12:
        assert time.monotonic() < end, dashboard.state.value
        time.sleep(0.02)
    dashboard.live.value = False
    assert threading.active_count() == before
    dashboard.stop()


def test_an_unforeseen_error_is_told(tmp_path, monkeypatch):
    dashboard = RunDashboard(synthetic_run(tmp_path / "run", steps=3, problems=4))
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    monkeypatch.setattr(dashboard, "refresh", lambda: 1 / 0)
    dashboard.start(every=0.01)
    end = time.monotonic() + 20
    while "no longer live" not in dashboard.state.value and time.monotonic() < end:
        time.sleep(0.02)
    assert "ZeroDivisionError" in dashboard.state.value
    dashboard.stop()


def test_nothing_to_watch_and_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="folders="):
        RunDashboard([])
    with pytest.raises(ValueError, match="no metrics yet"):
        RunDashboard(tmp_path / "none").figure()


def test_a_large_run_opens_at_once(tmp_path, record_property):
    """5,000 steps, and 20,000 samples of 1,500 characters and 400 token ids, before and after: the bar is 3 s, twice that is allowed on a busy machine."""
    folder = synthetic_run(tmp_path / "run", steps=5000, problems=10)
    rng = np.random.default_rng(0)
    samples = pd.DataFrame(
        {
            "problem": np.repeat(np.arange(5000), 4),
            "sample": np.tile(np.arange(4), 5000),
            "prompt": "Compute. " * 20,
            "answer": "7",
            "response": [f"{i} " + "so it follows " * 107 for i in range(20_000)],
            "tokens": 400,
            "truncated": False,
            "correct": np.arange(20_000) % 5 < 2,
            "extracted": "7",
            "seconds": 0.1,
            "set": "large",
            "step": 0,
            "token_ids": list(rng.integers(0, 9999, (20_000, 400))),
        }
    )
    for name in ("before", "after"):
        samples.to_parquet(folder / "eval" / f"{name}.parquet", index=False)
    start = time.perf_counter()
    dashboard = RunDashboard(folder)
    seconds = time.perf_counter() - start
    start = time.perf_counter()
    append(folder / "metrics.jsonl", [{"step": 5001, "seconds": 1e4, "loss": 0.1}])
    assert dashboard.refresh()
    print(f"\nopened in {seconds:.2f} s, refreshed in {time.perf_counter() - start:.2f} s")
    record_property("seconds", seconds)
    assert "5,001" in dashboard.state.value and "40.0% → 40.0%" in dashboard.state.value
    assert seconds < 6


# ---- in a browser

NOTEBOOK = """from oprd_nb.explore.dashboard import RunDashboard
dashboard = RunDashboard([{folder!r}])
dashboard.start(every=0.3)
dashboard"""


@pytest.mark.skipif(
    CHROMIUM is None or bool(os.environ.get("CI")), reason="needs Debian's chromium, and is not for CI"
)
def test_in_a_browser_it_follows_a_run_that_writes(tmp_path):
    folder, rows = tmp_path / "tonight", synthetic_metrics("oprd", steps=100)
    with opened(tmp_path, [NOTEBOOK.format(folder=str(folder))], 1300, 1700) as (page, playwright):
        expect = playwright.expect
        expect(page.get_by_text("not begun")).to_be_visible(timeout=180_000)
        folder.mkdir()
        (folder / "config.yaml").write_text("method: oprd\nmax_steps: 100\n")
        append(folder / "metrics.jsonl", rows[:40])
        expect(page.get_by_text("40 of 100")).to_be_visible(timeout=150_000)
        loss = page.locator(".js-plotly-plot").filter(has_text="Loss").locator("path.js-line")
        expect(loss).to_be_visible(timeout=150_000)
        early = loss.get_attribute("d")
        append(folder / "metrics.jsonl", rows[40:])
        expect(page.get_by_text("100 of 100")).to_be_visible(timeout=150_000)
        expect(loss).not_to_have_attribute("d", early, timeout=150_000)
        page.get_by_role("button", name="time").click()
        expect(page.locator(".js-plotly-plot .xtitle").first).to_have_text(
            "Training time, seconds", timeout=150_000
        )
        if shots := os.environ.get("OPRD_SHOTS"):
            page.screenshot(path=f"{shots}/dashboard.png")
