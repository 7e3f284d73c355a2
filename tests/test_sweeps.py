"""Tables of sweeps: intervals as in a textbook, paired by seed, and figures that show every seed."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from oprd_nb.plots.sweeps import final_figure, over_seeds, paired_gap, style_of, sweep_figure
from oprd_nb.utils import t_interval


@pytest.fixture()
def final():
    rows = [
        {
            "method": m,
            "learning_rate": 1e-3,
            "seed": seed,
            "before": 0.2,
            "accuracy": base + 0.1 * seed + wobble * (-1) ** seed,
        }
        for m, base, wobble in [
            ("readout", 0.5, 0.01),
            ("opd-full", 0.4, 0.0),
            ("bridge-8>opd-full", 0.1, 0.02),
        ]
        for seed in (1, 2, 3)
    ]
    return pd.DataFrame(rows)


def test_intervals_are_student_t():
    values = pd.Series([0.2, 0.5, 0.3, 0.9])
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert np.allclose(t_interval(values), (values.mean(), low, high))
    assert np.isnan(t_interval(pd.Series([0.5]))[1])


def test_the_seed_they_share_cancels(final):
    # Seeds move both methods by 0.1; paired, that is no part of the difference.
    gap, low, high = paired_gap(final, "readout", "opd-full")
    assert gap == pytest.approx(0.1 - 0.01 / 3)
    assert high - low < 0.1 < np.ptp(over_seeds(final)[["low", "high"]].iloc[0])
    with pytest.raises(ValueError, match="have 0 seeds in common"):
        paired_gap(final, "readout", "oprd")


def test_best_method_on_top_and_every_seed_drawn(final):
    table = over_seeds(final)
    fig = final_figure(final, "title", "subtitle")
    assert list(table.method) == ["readout", "opd-full", "bridge-8>opd-full"]
    ticks = [trace for trace in fig.data if trace.marker.symbol == "line-ns-open"]
    assert [len(trace.x) for trace in ticks] == [3, 3, 3]
    assert ticks[-1].name == style_of("readout").label
    assert fig.layout.xaxis.title.text == "accuracy on test problems"


def test_the_best_rate_is_marked():
    sweep = pd.DataFrame(
        {"method": "opd-full", "learning_rate": [1e-4, 1e-3, 1e-2], "accuracy": [0.2, 0.6, 0.1]}
    )
    fig = sweep_figure(sweep)
    assert list(fig.data[1].x) == [1e-3]
    assert list(fig.data[1].y) == [0.6]
    assert fig.layout.xaxis.type == "log"


@pytest.mark.parametrize(
    "name, label",
    [
        ("opd-full", "OPD full KL"),
        ("bridge-8", "OPRD-Bridge, r = 8"),
        ("bridge-4-ids", "OPRD-Bridge, r = 4, student's ids fed to the teacher"),
        ("readout-boundaries", "Readout bridge, shared boundaries only"),
        ("readout-every", "Readout bridge, after every token"),
        ("readout-directions", "Readout bridge, directions only"),
        ("opd-full>bridge-auto", "OPD full KL, then OPRD-Bridge, r = auto"),
        ("bridge-8>head", "OPRD-Bridge, r = 8, then a calibrated head"),
    ],
)
def test_names(name, label):
    assert style_of(name).label == label
