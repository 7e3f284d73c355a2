"""The bridge folder and its page: what is refused before a model is loaded, and what a reader finds in it."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from oprd_nb.bridge import ReadoutBridge, load_bridge
from oprd_nb.bridge.base import BridgeMetadata, ModelSpec
from oprd_nb.bridge.pca import Bridge
from oprd_nb.plots.bridge_page import (
    BridgeArguments,
    bridge_figure,
    bridge_page,
    facts,
    make_bridge,
    save_bridge_folder,
    sentence,
)
from oprd_nb.structure.moments import Moments

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the student's tokens")


def arguments(out, **changes):
    return BridgeArguments(
        **(
            dict(
                student="embedded/student",
                teacher="embedded/teacher_wide",
                limit=64,
                max_new_tokens=40,
                out=str(out),
            )
            | changes
        )
    )


@pytest.mark.parametrize(
    "kind, teacher, rank",
    [
        ("pca", "teacher_wide", "auto"),
        ("pca", "teacher_tokens", "4"),
        ("readout", "teacher_wide", "8"),
        ("readout", "teacher_tokens", "8"),
    ],
)
def test_a_folder_for_either_kind_and_either_pair(kind, teacher, rank, tmp_path):
    made = make_bridge(
        arguments(tmp_path / "bridge", kind=kind, teacher=f"embedded/{teacher}", rank=rank, steps=20)
    )
    again, scores = load_bridge(tmp_path / "bridge"), pd.read_csv(tmp_path / "bridge" / "scores.csv")
    assert type(again) is type(made) is (Bridge if kind == "pca" else ReadoutBridge) and len(scores) == len(
        made.scores
    )
    assert again.header.teacher.name == teacher and {p.name for p in (tmp_path / "bridge").iterdir()} == {
        "bridge.safetensors",
        "scores.csv",
        "report.html",
    }
    page = (tmp_path / "bridge" / "report.html").read_text("utf-8")
    assert sentence(made).split(";")[0].replace("'", "&#x27;") in page and all(
        answer in page for answer in facts(made).values()
    )
    assert "<script src" not in page and "Plotly.newPlot" in page


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "cca"}, "kind='cca': use 'pca' or 'readout'"),
        ({"rank": "0"}, "rank='0'"),
        ({"rank": "-1"}, "rank='-1'"),
        ({"steps": 0}, "steps=0"),
        ({"positions": "end"}, "positions='end'"),
        ({"student": "embedded/nobody"}, "model='embedded/nobody'"),
        ({"teacher": "no/such-model"}, "model='no/such-model'"),
        ({"layers": "9"}, "layers='9'"),
        ({"rank": "129"}, "rank=129"),
        ({"prompts": "nowhere.parquet"}, "nowhere.parquet"),
        ({"limit": 1}, "hold out whole responses"),
    ],
)
def test_a_request_that_cannot_be_met_leaves_nothing_behind(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        make_bridge(arguments(tmp_path / "bridge", **changes))
    assert "\n" not in str(error.value) and not (tmp_path / "bridge").exists()


def test_a_bridge_without_scores_says_so(tmp_path):
    moments = Moments([(1, 1)], 4, 5)
    moments.update((1, 1), torch.randn(50, 4), torch.randn(50, 5))
    bare = Bridge.fit(moments, 2)
    assert sentence(bare) == "" and "No held-out scores are stored" in bridge_page(bare)
    with pytest.raises(ValueError, match="stores no held-out scores"):
        bridge_figure(bare)
    named = Bridge(replace(bare.header, student=ModelSpec(4, name="<script>alert(1)</script>")), bare.tensors)
    assert "<script>alert" not in bridge_page(named)


def test_the_figure_shows_what_is_stored(tmp_path):
    scores = [
        {"offset": 0, "rows": 90, "share": 0.9, "fitted": 0.1, "student": 0.4, "ridge": 0.2},
        {"offset": 2, "rows": 10, "share": 0.1, "fitted": 0.3, "student": 0.8, "ridge": 0.6},
    ]
    header = BridgeMetadata(
        [(4, 6)], ModelSpec(3), ModelSpec(5), 3, "cross-entropy", 90, (0, 2), scores=scores
    )
    made = ReadoutBridge(header, {"weight": torch.zeros(2, 3, 5), "bias": torch.zeros(2, 3)})
    figure = bridge_figure(made)
    assert [list(trace.y) for trace in figure.data] == [[0.4, 0.8], [0.2, 0.6], [0.1, 0.3]] and list(
        figure.data[0].x
    ) == ["0 (90%)", "2 (10%)"]
    assert "0.440 nats" in sentence(made) and "0.120" in sentence(made)
    assert load_bridge(save_bridge_folder(made, tmp_path)).scores.equals(made.scores)
