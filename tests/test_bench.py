"""The bench: equal losses, one process per method, ratios within a run, stamps that allow a repetition."""

from dataclasses import replace

import pandas as pd
import pytest
import torch

from oprd_nb.bench.measure import (
    DeviceRounds,
    bench_growth,
    bench_loss_path,
    bench_on_device,
    bench_ragged,
    beyond_backbones,
    log_uniform,
    summary,
    target_bytes,
)
from oprd_nb.bench.methods import BACKBONES, PAPER, SMOLLM2, TINY, make_model, make_rollouts, methods_for
from oprd_nb.bench.results import cost_figure, growth_figure, load_bench, save_bench
from oprd_nb.bench.trainers import TINY_TRAINING
from oprd_nb.bench.whole_steps import bench_trainers, trainers_summary
from oprd_nb.cli.bench import BenchArguments, measure, run_bench, shape_of


@pytest.fixture(scope="module")
def measurements():
    return pd.DataFrame(
        {
            "method": [BACKBONES, "oprd", "trl-full"] * 3,
            "round": [0, 0, 0, 1, 1, 1, 2, 2, 2],
            "seconds": [1.0, 1.1, 2.0, 5.0, 1.3, 2.2, 1.2, 1.2, 2.1],
            "delta_peak": [10, 12, 40, 10, 12, 44, 14, 13, 42],
        }
    )


def test_every_way_computes_the_same_loss_and_gradient():
    student = make_model(TINY, 0)
    teacher = make_model(TINY, 1).requires_grad_(False)
    rollouts = make_rollouts(TINY)
    methods = methods_for(TINY)

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
    assert table.time_ratio.round(6).to_dict() == {BACKBONES: 1.0, "oprd": 1.0, "trl-full": 1.75}
    assert table.peak_ratio["trl-full"] == 4.2
    grown = beyond_backbones(measurements.assign(response=128), "response").set_index("method")
    assert grown.seconds["trl-full"] == pytest.approx(0.9) and grown.delta_peak["oprd"] == 2


def test_a_picture_of_ratios(measurements):
    fig = cost_figure(summary(measurements))
    expected = [pytest.approx(x) for x in ((1, 1), (1.2, 1), (4.2, 1.75))]
    assert [trace.x for trace in fig.data] == expected, (
        "peak and time of each method, the largest peak on top"
    )
    assert fig.layout.xaxis.type == "log"
    assert fig.layout.xaxis.title.text == "multiple of the backbones alone"
    assert [trace.marker.symbol[0] for trace in fig.data] == ["circle", "circle", "circle-open"]


def test_a_picture_of_growth(measurements):
    larger = measurements.assign(k=512, delta_peak=2 * measurements.delta_peak)
    fig = growth_figure(pd.concat([measurements.assign(k=128), larger]), "k")
    assert [trace.name for trace in fig.data] == ["OPRD, all layers", "Full KL, TRL's"]
    assert list(fig.data[0].x) == [128, 512] and fig.data[1].y[1] == 2 * fig.data[1].y[0]
    assert fig.layout.xaxis.title.text == "supervised positions k"
    assert fig.layout.yaxis.title.text.endswith("MB")
    with pytest.raises(ValueError, match="axis='width'"):
        bench_growth("width", [64])


def test_a_result_comes_back_with_its_stamp(measurements, tmp_path):
    loaded = load_bench(save_bench(tmp_path / "deep" / "x.json", TINY, rounds=measurements))
    assert loaded["rounds"].equals(measurements)
    assert loaded["stamp"]["shape"]["width"] == TINY.width and "torch" in loaded["stamp"]["versions"]


def test_results_stored_under_earlier_names_are_read(measurements, tmp_path):
    earlier = measurements.replace({"method": {BACKBONES: "floor"}})
    loaded = load_bench(save_bench(tmp_path / "x.json", TINY, rounds=earlier, over_floor=earlier))
    assert loaded["rounds"].equals(measurements) and loaded["beyond_backbones"].equals(measurements)
    assert "over_floor" not in loaded


def test_measured_in_a_process_of_its_own():
    shape = replace(TINY, vocabulary=8192)
    table = bench_loss_path(shape, [BACKBONES, "written-full"], rounds=2)
    assert list(table.method) == [BACKBONES, "written-full"] * 2
    assert (table.seconds > 0).all() and (table.delta_peak >= 0).all()
    peaks = table.groupby("method").delta_peak.first()
    # Two log-softmaxes of whole sequences are alive at the same time.
    log_softmaxes = 2 * shape.batch * (shape.prompt + shape.response) * shape.vocabulary * 4
    assert peaks["written-full"] - peaks[BACKBONES] > log_softmaxes
    with pytest.raises(ValueError, match=r"methods=\['magic'\]"):
        bench_loss_path(TINY, [BACKBONES, "magic"])


def test_on_a_device_what_fails_is_named_and_the_others_are_measured():
    methods = methods_for(TINY)
    calls = []

    def does_not_fit(student, teacher, rollouts):
        calls.append(student)
        student(rollouts.input_ids).logits.sum().backward()
        raise torch.OutOfMemoryError("no memory\nand more about it")

    few = {BACKBONES: methods[BACKBONES], "written-full": does_not_fit, "oprd": methods["oprd"]}
    result = bench_on_device(TINY, few, rounds=2)
    assert list(result.rounds.method) == [BACKBONES, "oprd"] * 2 and list(result.rounds["round"]) == [
        1,
        1,
        2,
        2,
    ]
    assert result.failed == {"written-full": "OutOfMemoryError: no memory"}
    assert len(calls) == 1, "not tried again"
    assert calls[0].get_input_embeddings().weight.grad is None, "its gradients are dropped"


def test_a_step_on_a_device_shares_the_models(monkeypatch):
    shapes = []

    def on_device(shape, methods, rounds):
        shapes.append((shape.device, list(methods), rounds))
        table = pd.DataFrame({"method": [BACKBONES], "round": [1], "seconds": [1.0], "delta_peak": [1]})
        return DeviceRounds(table, {"opd-full": "OutOfMemoryError: no memory"})

    monkeypatch.setattr("oprd_nb.cli.bench.bench_on_device", on_device)
    monkeypatch.setattr("oprd_nb.cli.bench.chosen_device", torch.device)
    request = BenchArguments("step", device="cuda", methods=f"{BACKBONES},opd-full", rounds=4, tiny=True)
    tables = measure(request)
    assert shapes == [("cuda", [BACKBONES, "opd-full"], 4)]
    assert list(tables["failed"].error) == ["OutOfMemoryError: no memory"]
    assert list(tables["summary"].time_ratio) == [1.0]


def test_targets_are_what_the_arithmetic_says():
    assert target_bytes(TINY) == 2 * 32 * 4 * 64 * 4
    assert target_bytes(TINY, rank=8) == target_bytes(TINY) // 8
    half = replace(TINY, dtype="bfloat16")
    assert target_bytes(half) == target_bytes(TINY) // 2
    assert target_bytes(half, rank=8) == target_bytes(TINY, rank=8) // 2


def test_ragged_lengths_are_log_uniform_and_gradients_agree():
    lengths = log_uniform(16, 32, 1024)
    assert (min(lengths), max(lengths)) == (32, 1024) and lengths != sorted(lengths)
    shape = replace(TINY, response=48, k=16)
    assert bench_ragged(shape, responses=6, low=2, budget=128, rounds=1).difference[0] < 1e-5


def test_results_are_named_by_what_is_measured():
    assert BenchArguments("growth", axis="k", out="x").path.as_posix() == "x/growth-k.json"
    assert BenchArguments("ragged", out="x").path.as_posix() == "x/ragged.json"


def test_a_request_means_a_shape():
    assert shape_of(BenchArguments("loss-path")) == SMOLLM2 and PAPER.k == 2000
    assert shape_of(BenchArguments("step")) == SMOLLM2
    assert shape_of(BenchArguments("growth", dtype="float32")) == replace(SMOLLM2, dtype="float32")
    assert shape_of(BenchArguments("peaks", tiny=True)) == TINY


def test_a_request_is_measured_and_stored(tmp_path):
    tables = run_bench(BenchArguments("bridge", tiny=True, out=str(tmp_path)))
    assert (tmp_path / "bridge.json").exists() and list(tables["targets"]["rank"]) == [4, 8, 32]


@pytest.mark.parametrize(
    "wrong, message",
    [({"what": "magic"}, "what='magic'"), ({"what": "peaks", "dtype": "float8"}, "dtype='float8'")],
)
def test_wrong_requests_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BenchArguments(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match="device='cuda': is not on this machine"):
        BenchArguments("step", device="cuda")


def test_multiples_of_trl_are_medians_of_ratios_in_one_round():
    """TRL's second round is slow; the ratio of that round counts once, as 1, and not the ratio of medians."""
    records = [
        ("trl", 0, 1.0, 1.0, 3.0),
        ("oprd", 0, 1.0, 0.5, 1.5),
        ("trl", 1, 1.0, 5.0, 5.0),
        ("oprd", 1, 1.0, 5.0, 5.0),
        ("trl", 2, 1.0, 2.0, 2.0),
        ("oprd", 2, 1.0, 1.0, 1.0),
    ]
    rounds = pd.DataFrame(records, columns=["method", "round", "rollout", "teacher", "update"])
    rounds["step"] = rounds[["rollout", "teacher", "update"]].sum(axis=1)
    table = trainers_summary(rounds)
    assert table["learning / TRL's"].tolist() == [1.0, 0.5]
    assert table["step / TRL's"].tolist() == [1.0, 0.6]
    assert table["teacher"].tolist() == [2.0, 1.0]
    assert "learning / TRL's" not in trainers_summary(rounds[rounds["method"] == "oprd"])


def test_trainers_that_do_not_exist_and_too_many_rounds_are_refused():
    with pytest.raises(ValueError, match="methods='grpo'"):
        bench_trainers(TINY_TRAINING, ["grpo"])
    with pytest.raises(ValueError, match="rounds=0"):
        bench_trainers(TINY_TRAINING, rounds=0)
