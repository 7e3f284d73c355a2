"""The explorers: what they show, what they refuse, and that a slider in a real browser moves the figure."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import numpy as np
import pandas as pd
import pytest

from oprd_nb.explore.figures import (
    cka_map,
    error_shares,
    layer_axis,
    layer_curve,
    layer_map,
    position_curve,
    probe_curve,
    rank_figure,
    visible,
)
from oprd_nb.explore.layers import LayerExplorer, RankExplorer, redraw

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def token_table(responses=3, length=12, layers=(1, 2, 3, 7), seed=0):
    """Cosines of a made-up pair that parts in layer 3: 1 below, falling from there on."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(
        {
            "response": np.repeat(np.arange(responses), length),
            "position": np.tile(np.arange(length), responses),
            "length": length,
            "text": list("3+4=7\n 12<&x") * responses,
        }
    )
    for layer in layers:
        rows[layer] = 1.0 if layer < 3 else 1 - 0.05 * layer * rng.random(len(rows))
    return rows


def rank_tables(width=24, layers=(1, 2)):
    """Components and curve of a made-up pair whose share predicted falls through one half after component 8."""
    i = np.arange(1, width + 1)
    components = pd.concat(
        [
            pd.DataFrame(
                {"component": i, "eigenvalue": i**-1.0, "rho2": np.where(i <= 8, 0.9, 0.1), "layer": layer}
            )
            for layer in layers
        ]
    )
    curve = pd.concat(
        [
            pd.DataFrame(
                {
                    "layer": layer,
                    "rank": i,
                    "cosine": 1 - i / 100,
                    "r2": 0.9 - i / 50,
                    "explained_variance": i / width,
                }
            )
            for layer in layers
        ]
    )
    return components, curve


def test_map_of_one_response_shows_every_token():
    fig = layer_map(token_table(), response=1)
    assert fig.data[0].z.shape == (4, 12) and list(fig.data[0].y) == [1, 2, 3, 7]
    assert list(fig.data[0].customdata[2]) == [
        "3",
        "+",
        "4",
        "=",
        "7",
        "⏎",
        "␣",
        "1",
        "2",
        "&lt;",
        "&amp;",
        "x",
    ]
    assert (fig.data[0].z[:2] == 1).all() and (fig.data[0].z[2:] < 1).any(1).all()


def test_mean_map_is_the_mean():
    rows = token_table()
    assert np.allclose(layer_map(rows).data[0].z[3], rows.groupby("position")[7].mean(), atol=1e-6)


def test_long_responses_are_binned_and_their_tokens_not_printed():
    rows = pd.DataFrame({"response": 0, "position": np.arange(5000), "length": 5000, "text": "word", 1: 0.5})
    assert layer_map(rows).data[0].z.shape == (1, 40)
    assert layer_map(rows, response=0).layout.xaxis.ticktext is None


@pytest.mark.parametrize(
    "text, shown", [("", ""), (" ", "␣"), (" a ", "␣a␣"), ("\t\n", "⇥⏎"), ("a  b", "a  b")]
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_layer_explorer_follows_its_controls_and_a_click():
    rows = token_table()
    explorer = LayerExplorer(rows)
    assert explorer.response.value is None and "mean" in explorer.map.layout.title.text
    explorer.response.value = 2
    assert "response 2" in explorer.map.layout.title.text and np.allclose(
        explorer.map.data[0].z[3], rows.loc[rows.response == 2, 7], atol=1e-6
    )
    explorer._clicked(None, type("Points", (), {"ys": [3]}), None)
    assert explorer.layer.value == 3 and "Layer 3" in explorer.curve.layout.title.text
    assert np.allclose(explorer.curve.data[0].y, rows.loc[rows.response == 2, 3], atol=1e-6)
    explorer.response.value = None
    assert len(explorer.map.data[0].x) == 12


def test_rank_explorer_equals_the_static_figure():
    components, curve = rank_tables()
    explorer = RankExplorer(components, curve, rank=3)
    explorer.rank.value, explorer.layer.value = 11, 2
    expected = rank_figure(components[components.layer == 2], curve[curve.layer == 2], 11)
    assert (
        explorer.figure.layout.title.text == expected.layout.title.text
        and explorer.figure.layout.shapes == expected.layout.shapes
    )
    for shown, wanted in zip(explorer.figure.data, expected.data, strict=True):
        assert np.array_equal(shown.x, wanted.x) and np.array_equal(shown.y, wanted.y)


def test_rank_explorer_takes_the_tables_of_one_layer():
    components, curve = rank_tables(layers=(5,))
    assert RankExplorer(components.drop(columns="layer"), curve).layer.options == (5,)


def test_error_shares_are_theirs():
    components, _ = rank_tables()
    one = components[components.layer == 1]
    errors = error_shares(one)
    lam, rho = one.eigenvalue.to_numpy(), one.rho2.to_numpy()
    for r in (0, 1, 8, 24):
        assert np.isclose(errors.total[r], ((lam * rho)[r:].sum() + (lam * (1 - rho))[:r].sum()) / lam.sum())
    assert errors.total.idxmin() == 8


def test_negative_shares_count_as_none():
    table = pd.DataFrame({"component": [1, 2], "eigenvalue": [2.0, 1.0], "rho2": [0.8, -3.0]})
    assert (
        error_shares(table).total.idxmin() == 1 and error_shares(table.assign(rho2=-1.0)).total.idxmin() == 0
    )


def test_axis_of_layers():
    assert layer_axis([1, 30])["dtick"] == 3 and layer_axis([25, 28])["range"] == [24.5, 28.5]


def test_cka_map_names_true_layers():
    matrix = pd.DataFrame([[0.9, 0.1, 0.2], [0.1, 0.2, 0.8]], index=[4, 8], columns=[6, 12, 18])
    fig = cka_map(matrix)
    assert list(fig.data[1].x) == [6, 18] and list(fig.data[1].y) == [4, 8] and list(fig.data[2].x) == [6, 18]


def test_probe_curve_shows_control_and_chance():
    table = pd.DataFrame(
        {
            "layer": [1, 2],
            "score": [0.5, 0.9],
            "low": [0.4, 0.8],
            "high": [0.6, 1.0],
            "control": [0.2, 0.25],
            "chance": 0.3,
        }
    )
    fig = probe_curve({"student": table, "teacher": table.assign(score=0.95)}, "the next digit")
    assert (
        "chance: 30%" in [trace.name for trace in fig.data]
        and sum(tuple(trace.y) == (0.2, 0.25) for trace in fig.data) == 2
    )


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: layer_map(token_table(), response=9), "response=9"),
        (lambda: position_curve(token_table(), layer=4), "layer=4"),
        (lambda: rank_figure(*rank_tables(layers=(1,)), rank=99), "rank=99"),
        (lambda: layer_map(token_table().drop(columns="text")), "text"),
        (lambda: layer_curve(pd.DataFrame({"layer": [1]})), "cosine"),
        (lambda: RankExplorer(rank_tables()[0], rank_tables()[1].drop(columns="r2")), "r2"),
    ],
)
def test_refusals_are_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_redraw_refuses_another_kind_of_figure():
    explorer = RankExplorer(*rank_tables())
    with pytest.raises(ValueError):
        redraw(explorer.figure, layer_map(token_table()))


NOTEBOOK = (
    """import sys
sys.path.insert(0, {tests!r})
from test_explore import rank_tables, token_table
from oprd_nb.explore import LayerExplorer, RankExplorer
RankExplorer(*rank_tables(), rank=3)""",
    "LayerExplorer(token_table())",
)


@contextmanager
def jupyterlab(folder: Path):
    """A JupyterLab of our own on a free port of this machine, its settings in `folder`; yields its address."""
    with closing(socket.socket()) as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    own = {
        name: str(folder / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={folder}",
        "--LabApp.news_url=",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with open(folder / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=os.environ | own, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@contextmanager
def opened(folder, sources: list[str], width: int, height: int):
    """A notebook of these cells in a real JupyterLab and a real browser, run from top to bottom: the page, and playwright."""
    playwright = pytest.importorskip("playwright.sync_api")
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(
        nbformat.v4.new_notebook(
            cells=cells,
            metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}},
        ),
        folder / "small.ipynb",
    )
    with jupyterlab(folder) as address, playwright.sync_playwright() as p:
        assert answers(address, 90), (folder / "lab.log").read_text()[-2000:]
        browser = p.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(f"{address}/lab/tree/small.ipynb")
        page.locator(".jp-CodeCell .cm-content").first.click(timeout=120_000)
        for _ in sources:
            page.keyboard.press("Shift+Enter")
        yield page, playwright
        browser.close()


def drag(page, handle, pixels: int) -> None:
    """Pull a handle to the right with the mouse, in steps as a hand does."""
    box = handle.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + pixels, y, steps=8)
    page.mouse.up()


def answers(address: str, seconds: float) -> bool:
    """Whether the address answers within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return urlopen(address + "/api", timeout=5).status == 200
        except (URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    return False


@pytest.mark.skipif(
    CHROMIUM is None or bool(os.environ.get("CI")), reason="needs Debian's chromium, and is not for CI"
)
def test_dragging_the_slider_in_a_browser_moves_the_figure(tmp_path):
    with opened(
        tmp_path, [source.format(tests=str(Path(__file__).parent)) for source in NOTEBOOK], 1200, 1600
    ) as (page, playwright):
        rank_plot, map_plot, curve_plot = (page.locator(".js-plotly-plot").nth(i) for i in range(3))
        curve_plot.locator(".gtitle").wait_for(timeout=180_000)
        assert "rank 3" in rank_plot.locator(".gtitle").text_content()
        before = rank_plot.locator("path.js-line").nth(1).get_attribute("d")
        drag(page, page.locator(".noUi-handle").first, 50)
        expect = playwright.expect
        expect(rank_plot.locator(".gtitle")).to_have_text(
            re.compile(r"A bridge of rank (1\d|2\d)"), timeout=30_000
        )
        assert rank_plot.locator("path.js-line").nth(1).get_attribute("d") != before

        assert "Layer 7" in curve_plot.locator(".gtitle").text_content()
        area = map_plot.locator(".nsewdrag").bounding_box()
        page.mouse.click(area["x"] + area["width"] / 2, area["y"] + area["height"] - 4)
        expect(curve_plot.locator(".gtitle")).to_contain_text("Layer 1", timeout=30_000)
