"""Figures and explorers of layers and ranks: what they show, what they refuse, and a slider in a browser."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from jupyter_page import drag, opened

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
from oprd_nb.explore.layers import LayerExplorer, RankExplorer


def token_table(responses=3, length=12, layers=(1, 2, 3, 7), seed=0):
    """Cosines of a made-up pair: 1 below layer 3, falling from there on."""
    rng = np.random.default_rng(seed)
    tokens = pd.DataFrame(
        {
            "response": np.repeat(np.arange(responses), length),
            "position": np.tile(np.arange(length), responses),
            "length": length,
            "text": list("3+4=7\n 12<&x") * responses,
        }
    )
    for layer in layers:
        tokens[layer] = 1.0
        if layer >= 3:
            tokens[layer] -= 0.05 * layer * rng.random(len(tokens))
    return tokens


def rank_tables(width=24, layers=(1, 2)):
    """Components and curve of a made-up pair; after component 8 less than half is predicted."""
    i = np.arange(1, width + 1)
    rho2 = np.where(i <= 8, 0.9, 0.1)
    components = []
    curve = []
    for layer in layers:
        components.append(pd.DataFrame({"component": i, "eigenvalue": 1.0 / i, "rho2": rho2, "layer": layer}))
        curve.append(
            pd.DataFrame(
                {
                    "layer": layer,
                    "rank": i,
                    "cosine": 1 - i / 100,
                    "r2": 0.9 - i / 50,
                    "explained_variance": i / width,
                }
            )
        )
    return pd.concat(components), pd.concat(curve)


def test_map_of_one_response_shows_every_token():
    heat = layer_map(token_table(), response=1).data[0]
    assert heat.z.shape == (4, 12)
    assert list(heat.y) == [1, 2, 3, 7]
    assert " ".join(heat.customdata[2]) == "3 + 4 = 7 ⏎ ␣ 1 2 &lt; &amp; x"
    assert (heat.z[:2] == 1).all()
    assert (heat.z[2:] < 1).any(1).all()


def test_mean_map_is_the_mean():
    tokens = token_table()
    assert np.allclose(layer_map(tokens).data[0].z[3], tokens.groupby("position")[7].mean(), atol=1e-6)


def test_long_responses_are_binned_and_their_tokens_not_printed():
    tokens = pd.DataFrame(
        {"response": 0, "position": np.arange(5000), "length": 5000, "text": "word", 1: 0.5}
    )
    assert layer_map(tokens).data[0].z.shape == (1, 40)
    assert layer_map(tokens, response=0).layout.xaxis.ticktext is None


@pytest.mark.parametrize(
    "text, shown", [("", ""), (" ", "␣"), (" a ", "␣a␣"), ("\t\n", "⇥⏎"), ("a  b", "a  b")]
)
def test_visible(text, shown):
    assert visible(text) == shown


def test_layer_explorer_follows_its_controls_and_a_click():
    tokens = token_table()
    explorer = LayerExplorer(tokens)
    # None would be shown as an empty menu.
    assert (explorer.response.value, explorer.response.label) == ("all", "all")
    assert "mean" in explorer.map.layout.title.text

    explorer.response.value = 2
    in_layer_7 = tokens.loc[tokens["response"] == 2, 7]
    assert "response 2" in explorer.map.layout.title.text
    assert np.allclose(explorer.map.data[0].z[3], in_layer_7, atol=1e-6)

    explorer.map._receive(explorer.map, {"kind": "click", "x": 0, "y": 3}, [])
    in_layer_3 = tokens.loc[tokens["response"] == 2, 3]
    assert explorer.layer.value == 3
    assert "Layer 3" in explorer.curve.layout.title.text
    assert np.allclose(explorer.curve.data[0].y, in_layer_3, atol=1e-6)

    explorer.response.value = "all"
    assert len(explorer.map.data[0].x) == 12


def test_colours_mean_the_same_in_every_response():
    explorer = LayerExplorer(token_table())
    scales = set()
    for response in ("all", 0, 1, 2):
        explorer.response.value = response
        heat = explorer.map.data[0]
        scales.add((heat.zmin, heat.zmax, *explorer.curve.layout.yaxis.range))
    assert len(scales) == 1


def test_a_slider_plays_over_evaluations_on_one_scale():
    tables = {f"step {step}": token_table(responses=3 - step // 50, seed=step) for step in (0, 50, 100)}
    explorer = LayerExplorer(tables)
    scales = set()
    explorer.response.value = 1
    for name, shown in (("step 0", 1), ("step 50", 1), ("step 100", "all")):
        explorer.when.value = name
        assert explorer.response.value == shown
        expected = layer_map(tables[name], None if shown == "all" else shown)
        heat = explorer.map.data[0]
        assert np.array_equal(heat.z, expected.data[0].z)
        scales.add((heat.zmin, heat.zmax, *explorer.curve.layout.yaxis.range))
    assert len(scales) == 1
    assert explorer.when in explorer.children[0].children
    assert len(LayerExplorer(token_table()).children[0].children) == 2
    with pytest.raises(ValueError, match="has layers"):
        LayerExplorer({"a": token_table(), "b": token_table(layers=(1, 2))})


def test_a_panel_repeats_its_whole_state_to_a_view_that_missed_a_change():
    explorer = LayerExplorer(token_table())
    explorer.response.value = 2
    sent = []
    state = explorer.map.state
    state.send_state = lambda: sent.append(json.loads(state.figure))
    explorer.map._receive(explorer.map, {"kind": "shows", "count": 0}, [])
    assert "response 2" in sent[0]["layout"]["title"]["text"]
    explorer.map._receive(explorer.map, {"kind": "shows", "count": state.count}, [])
    assert len(sent) == 1
    assert len(state.figure) < 100_000  # the plotting library is not part of it
    assert explorer.map.library == explorer.curve.library


def test_where_widgets_cannot_run_there_is_a_hint():
    explorer = LayerExplorer(token_table())
    assert "static figures" in explorer._repr_mimebundle_()["text/html"]
    assert explorer.figure().data[0].type == "heatmap"


def test_rank_explorer_equals_the_static_figure():
    components, curve = rank_tables()
    explorer = RankExplorer(components, curve, rank=3)
    explorer.rank.value = 11
    explorer.layer.value = 2
    expected = rank_figure(components[components["layer"] == 2], curve[curve["layer"] == 2], 11)
    assert explorer.figure.layout.title.text == expected.layout.title.text
    assert explorer.figure.layout.shapes == expected.layout.shapes
    for shown, trace in zip(explorer.figure.data, expected.data, strict=True):
        assert np.array_equal(shown.x, trace.x)
        assert np.array_equal(shown.y, trace.y)


def test_rank_explorer_takes_the_tables_of_one_layer():
    components, curve = rank_tables(layers=(5,))
    assert RankExplorer(components.drop(columns="layer"), curve).layer.options == (5,)


def test_error_shares_follow_the_equation():
    components, _ = rank_tables()
    one = components[components["layer"] == 1]
    errors = error_shares(one)
    lam = one["eigenvalue"].to_numpy()
    rho2 = one["rho2"].to_numpy()
    for r in (0, 1, 8, 24):
        expected = (lam * rho2)[r:].sum() + (lam * (1 - rho2))[:r].sum()
        assert np.isclose(errors["total"][r], expected / lam.sum())
    assert errors["total"].idxmin() == 8


def test_negative_shares_count_as_none():
    table = pd.DataFrame({"component": [1, 2], "eigenvalue": [2.0, 1.0], "rho2": [0.8, -3.0]})
    assert error_shares(table)["total"].idxmin() == 1
    assert error_shares(table.assign(rho2=-1.0))["total"].idxmin() == 0


def test_axis_of_layers():
    assert layer_axis([1, 30])["dtick"] == 3
    assert layer_axis([25, 28])["range"] == [24.5, 28.5]


def test_cka_map_names_true_layers():
    matrix = pd.DataFrame([[0.9, 0.1, 0.2], [0.1, 0.2, 0.8]], index=[4, 8], columns=[6, 12, 18])
    _, similar, proportional = cka_map(matrix).data
    assert list(similar.x) == [6, 18]
    assert list(similar.y) == [4, 8]
    assert list(proportional.x) == [6, 18]


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
    assert "chance: 30%" in [trace.name for trace in fig.data]
    assert sum(tuple(trace.y) == (0.2, 0.25) for trace in fig.data) == 2


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


def test_a_panel_refuses_another_kind_of_figure():
    explorer = RankExplorer(*rank_tables())
    with pytest.raises(ValueError):
        explorer.figure.show(layer_map(token_table()))


NOTEBOOK = [
    """import pandas as pd
from oprd_nb.diagnosis import read_tokens
from oprd_nb.explore import LayerExplorer, RankExplorer
folder = {folder!r}
RankExplorer(pd.read_csv(folder + "/components.csv"), pd.read_csv(folder + "/rank_curve.csv"), rank=3)""",
    "LayerExplorer(read_tokens(folder))",
]


@pytest.mark.browser
def test_dragging_the_slider_in_a_browser_moves_the_figure(tmp_path):
    components, curve = rank_tables()
    components.to_csv(tmp_path / "components.csv", index=False)
    curve.to_csv(tmp_path / "rank_curve.csv", index=False)
    token_table().rename(columns=str).to_parquet(tmp_path / "tokens.parquet", index=False)
    sources = [source.format(folder=str(tmp_path)) for source in NOTEBOOK]
    with opened(tmp_path, sources, 1200, 1600) as (page, playwright):
        expect = playwright.expect
        plots = page.locator(".js-plotly-plot")
        rank_title = plots.nth(0).locator(".gtitle")
        curve_title = plots.nth(2).locator(".gtitle")
        curve_title.wait_for(timeout=180_000)
        assert "rank 3" in rank_title.text_content()

        line = plots.nth(0).locator("path.js-line").nth(1)
        before = line.get_attribute("d")
        drag(page, page.locator(".noUi-handle").first, 50)
        expect(rank_title).to_have_text(re.compile(r"A bridge of rank (1\d|2\d)"), timeout=30_000)
        assert line.get_attribute("d") != before

        assert "Layer 7" in curve_title.text_content()
        area = plots.nth(1).locator(".nsewdrag").bounding_box()
        page.mouse.click(area["x"] + area["width"] / 2, area["y"] + area["height"] - 4)
        expect(curve_title).to_contain_text("Layer 1", timeout=30_000)
