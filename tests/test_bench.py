"""The bench measures what it says: equal losses, one process a method, ratios within a run, stamps that allow a repetition."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from oprd_nb.bench import (
    PAPER,
    SMOLLM2,
    TINY,
    bench_growth,
    bench_loss_path,
    bench_ragged,
    cost_figure,
    growth_figure,
    load_bench,
    log_uniform,
    make_model,
    make_rollouts,
    methods_for,
    over_floor,
    save_bench,
    summary,
    target_bytes,
)
from oprd_nb.cli.bench import BenchArguments, run_bench, shape_of


@pytest.fixture(scope="module")
def measurements():
    return pd.DataFrame(
        {
            "method": ["floor", "oprd", "trl-full"] * 3,
            "round": [0, 0, 0, 1, 1, 1, 2, 2, 2],
            "seconds": [1.0, 1.1, 2.0, 5.0, 1.3, 2.2, 1.2, 1.2, 2.1],
            "delta_peak": [10, 12, 40, 10, 12, 44, 14, 13, 42],
        }
    )


def test_every_way_computes_the_same_loss_and_gradient():
    student, teacher, rollouts, methods = (
        make_model(TINY, 0),
        make_model(TINY, 1).requires_grad_(False),
        make_rollouts(TINY),
        methods_for(TINY),
    )

    def gradient(name):
        student.zero_grad()
        methods[name](student, teacher, rollouts).backward()
        return torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None])

    for one, other, factor in [
        ("opd-full", "trl-full", 1),
        ("opd-full", "written-full", 1),
        ("opd-topk", "written-topk", 1),
        ("opd-sampled", "written-sampled", 1),
        ("oprd", "reference-oprd", TINY.layers),
    ]:
        assert torch.allclose(factor * gradient(one), gradient(other), atol=1e-5), (one, other)


def test_ratios_are_of_medians_in_one_run(measurements):
    table = summary(measurements).set_index("method")
    assert (
        table.time_ratio.round(6).to_dict() == {"floor": 1.0, "oprd": 1.0, "trl-full": 1.75}
        and table.peak_ratio["trl-full"] == 4.2
    )
    grown = over_floor(measurements.assign(response=128), "response").set_index("method")
    assert grown.seconds["trl-full"] == pytest.approx(0.9) and grown.delta_peak["oprd"] == 2


def test_a_picture_of_ratios(measurements):
    fig = cost_figure(summary(measurements))
    assert [trace.x for trace in fig.data] == [pytest.approx(x) for x in ((1, 1), (1.2, 1), (4.2, 1.75))], (
        "peak and time of each method, the hungriest on top"
    )
    assert fig.layout.xaxis.type == "log" and fig.layout.xaxis.title.text == "multiple of the floor"
    assert [trace.marker.symbol[0] for trace in fig.data] == ["circle", "circle", "circle-open"]


def test_a_picture_of_growth(measurements):
    grown = pd.concat(
        [measurements.assign(k=128), measurements.assign(k=512, delta_peak=2 * measurements.delta_peak)]
    )
    fig = growth_figure(grown, "k")
    assert [trace.name for trace in fig.data] == ["OPRD, all layers", "Full KL, TRL's"] and list(
        fig.data[0].x
    ) == [128, 512]
    assert (
        fig.data[1].y[1] == 2 * fig.data[1].y[0]
        and fig.layout.xaxis.title.text == "supervised positions k"
        and fig.layout.yaxis.title.text.endswith("MB")
    )
    assert (
        BenchArguments("growth", axis="k", out="x").path.as_posix() == "x/growth-k.json"
        and BenchArguments("ragged", out="x").path.as_posix() == "x/ragged.json"
    )
    with pytest.raises(ValueError, match="axis='width'"):
        bench_growth("width", [64])


def test_a_result_comes_back_with_its_stamp(measurements, tmp_path):
    found = load_bench(save_bench(tmp_path / "deep" / "x.json", TINY, rounds=measurements))
    assert (
        found["rounds"].equals(measurements)
        and found["stamp"]["shape"]["width"] == TINY.width
        and "torch" in found["stamp"]["versions"]
    )


def test_measured_in_a_process_of_its_own():
    shape = replace(TINY, vocabulary=8192)
    table = bench_loss_path(shape, ["floor", "written-full"], rounds=2)
    assert (
        list(table.method) == ["floor", "written-full"] * 2
        and (table.seconds > 0).all()
        and (table.delta_peak >= 0).all()
    )
    peaks = table.groupby("method").delta_peak.first()
    log_softmaxes = 2 * shape.batch * (shape.prompt + shape.response) * shape.vocabulary * 4
    assert peaks["written-full"] - peaks["floor"] > log_softmaxes, (
        "two log-softmaxes of whole sequences are alive at the same time"
    )
    with pytest.raises(ValueError, match=r"methods=\['magic'\]"):
        bench_loss_path(TINY, ["floor", "magic"])


def test_targets_are_what_the_arithmetic_says():
    assert target_bytes(TINY) == 2 * 32 * 4 * 64 * 4 and target_bytes(TINY, rank=8) == target_bytes(TINY) // 8
    half = replace(TINY, dtype="bfloat16")
    assert (
        target_bytes(half) == target_bytes(TINY) // 2
        and target_bytes(half, rank=8) == target_bytes(TINY, rank=8) // 2
    )


def test_ragged_lengths_are_log_uniform_and_gradients_agree():
    lengths = log_uniform(16, 32, 1024)
    assert (min(lengths), max(lengths)) == (32, 1024) and lengths != sorted(lengths)
    assert (
        bench_ragged(replace(TINY, response=48, k=16), responses=6, low=2, budget=128, rounds=1).difference[0]
        < 1e-5
    )


def test_requests(tmp_path):
    assert (
        shape_of(BenchArguments("loss-path")) == SMOLLM2
        and shape_of(BenchArguments("step")) == SMOLLM2
        and PAPER.k == 2000
    )
    tables = run_bench(BenchArguments("bridge", tiny=True, out=str(tmp_path)))
    assert (tmp_path / "bridge.json").exists() and list(tables["targets"]["rank"]) == [4, 8, 32]
    assert (
        shape_of(BenchArguments("growth", dtype="float32")) == replace(SMOLLM2, dtype="float32")
        and shape_of(BenchArguments("peaks", tiny=True)) == TINY
    )
    for wrong, message in [
        ({"what": "magic"}, "what='magic'"),
        ({"what": "peaks", "dtype": "float8"}, "dtype='float8'"),
        ({"what": "step", "rounds": 0}, "rounds=0"),
    ]:
        with pytest.raises(ValueError, match=message):
            BenchArguments(**wrong)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="there is no GPU"):
            BenchArguments("step", device="cuda")
