"""The bridge folder and its page: what is refused before a model is loaded, and what the page says."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from oprd_nb.bridge import ReadoutBridge
from oprd_nb.bridge.base import BridgeMetadata, ModelSpec
from oprd_nb.bridge.fitting import fit_from_prompts
from oprd_nb.bridge.pca import Bridge
from oprd_nb.bridge.readout import load_bridge
from oprd_nb.cli.bridge import BridgeArguments, make_bridge
from oprd_nb.models.pairs import embedded
from oprd_nb.plots.bridge_page import bridge_figure, bridge_page, facts, save_bridge_folder, sentence
from oprd_nb.structure.moments import Moments
from oprd_nb.teachers import Teacher

pytestmark = pytest.mark.filterwarnings("ignore:only .* of the student's tokens")


def arguments(out, **changes):
    settings = {
        "student": "embedded/student",
        "teacher": "embedded/teacher_wide",
        "limit": 64,
        "max_new_tokens": 40,
        "out": str(out),
    }
    return BridgeArguments(**(settings | changes))


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
    folder = tmp_path / "bridge"
    bridge = make_bridge(arguments(folder, kind=kind, teacher=f"embedded/{teacher}", rank=rank, steps=20))
    again = load_bridge(folder)
    expected = Bridge if kind == "pca" else ReadoutBridge
    assert type(again) is type(bridge) is expected
    assert again.header.teacher.name == teacher
    assert len(pd.read_csv(folder / "scores.csv")) == len(bridge.scores)
    files = {path.name for path in folder.iterdir()}
    assert files == {"bridge.safetensors", "scores.csv", "report.html", "about.json"}

    page = (folder / "report.html").read_text("utf-8")
    assert sentence(bridge).split(";")[0].replace("'", "&#x27;") in page
    assert all(answer in page for answer in facts(bridge).values())
    assert "<script src" not in page
    assert "Plotly.newPlot" in page


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
    assert "\n" not in str(error.value)
    assert not (tmp_path / "bridge").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"kind": "cca"}, "kind='cca'"),
        ({"rank": 0}, "rank=0"),
        ({"rank": "many"}, "rank='many'"),
        ({"positions": "end"}, "positions='end'"),
        ({"layers": "9"}, "layers='9'"),
    ],
)
def test_a_fit_that_cannot_be_made_is_refused_before_anything_is_sampled(settings, message):
    pair = embedded("cross_architecture")
    teacher = Teacher(pair.teacher, pair.teacher_tokenizer)
    # No prompt could be sampled from: the refusal has to come first.
    with pytest.raises(ValueError, match=message):
        fit_from_prompts(pair.student, teacher, pair.tokenizer, None, **settings)


def test_a_bridge_without_scores_says_so():
    moments = Moments([(1, 1)], 4, 5)
    moments.update((1, 1), torch.randn(50, 4), torch.randn(50, 5))
    bare = Bridge.fit(moments, 2)
    assert sentence(bare) == ""
    assert "No held-out scores are stored" in bridge_page(bare)
    with pytest.raises(ValueError, match="stores no held-out scores"):
        bridge_figure(bare)
    student = ModelSpec(4, name="<script>alert(1)</script>")
    named = Bridge(replace(bare.header, student=student), bare.tensors)
    assert "<script>alert" not in bridge_page(named)


def test_the_figure_shows_what_is_stored(tmp_path):
    scores = [
        {"offset": 0, "rows": 90, "share": 0.9, "fitted": 0.1, "student": 0.4, "ridge": 0.2},
        {"offset": 2, "rows": 10, "share": 0.1, "fitted": 0.3, "student": 0.8, "ridge": 0.6},
    ]
    header = BridgeMetadata(
        [(4, 6)], ModelSpec(3), ModelSpec(5), 3, "cross-entropy", 90, (0, 2), scores=scores
    )
    bridge = ReadoutBridge(header, {"weight": torch.zeros(2, 3, 5), "bias": torch.zeros(2, 3)})
    figure = bridge_figure(bridge)
    assert [list(trace.y) for trace in figure.data] == [[0.4, 0.8], [0.2, 0.6], [0.1, 0.3]]
    assert list(figure.data[0].x) == ["0 (90%)", "2 (10%)"]
    assert "0.440 nats" in sentence(bridge)
    assert "0.120" in sentence(bridge)
    assert load_bridge(save_bridge_folder(bridge, tmp_path)).scores.equals(bridge.scores)
