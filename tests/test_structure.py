"""Moments, spectrum, closed form, E(r) and the suggested rank: properties, failures, and their bars."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oprd_nb.structure.moments import (
    CHUNK,
    Moments,
    PairMoments,
    check_stored,
    effective_rank,
    pca_spectrum,
    planted_pair,
)
from oprd_nb.structure.ranks import (
    best_rank,
    component_r2,
    error_decomposition,
    error_decrease,
    group_index,
    rank_curve,
    suggest_rank,
    too_few_positions,
)
from oprd_nb.structure.ridge import (
    GCV_GAMMA,
    LEAST_REMAINING,
    SCARCE_FOR_GAMMA,
    SCARCE_FOR_OWN,
    fit_all,
    fit_ridge,
    fit_sgd,
    prefix_cosine,
)
from oprd_nb.utils import measured

PAIR = (2, 3)


def covariance(moments, pair=PAIR):
    """The joint covariance of (student, teacher) columns that the moments hold."""
    m = moments[pair]
    top, bottom = (
        torch.cat([m.scatter_student, m.scatter_cross], 1),
        torch.cat([m.scatter_cross.T, m.scatter_teacher], 1),
    )
    return (torch.cat([top, bottom]) / (m.count - 1)).numpy()


def seen(student, teacher, pairs=(PAIR,)):
    moments = Moments(pairs, student.shape[1], teacher.shape[1])
    for pair in pairs:
        moments.update(pair, student, teacher)
    return moments


def gaussian(rows, d_student=5, d_teacher=7, seed=0, offset=0.0):
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, d_student, generator=g, dtype=torch.float64)
    mix = torch.randn(d_student, d_teacher, generator=g, dtype=torch.float64)
    return student + offset, student @ mix + torch.randn(rows, d_teacher, generator=g, dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=8), st.integers(0, 8), st.sampled_from([0.0, 1e4]))
def test_any_batching_and_any_merge_equal_numpy(sizes, cut, offset):
    student, teacher = gaussian(sum(sizes) + 2, offset=offset)
    parts = list(zip(student.split([*sizes, 2]), teacher.split([*sizes, 2]), strict=True))
    a, b = Moments([PAIR], 5, 7), Moments([PAIR], 5, 7)
    for i, part in enumerate(parts):
        (a if i < cut else b).update(PAIR, *part)
    expected = np.cov(torch.cat([student, teacher], 1).numpy(), rowvar=False)
    assert a.merge(b) is a and a[PAIR].count == len(student)
    np.testing.assert_allclose(
        covariance(a), expected, rtol=0, atol=1e-10 * max(1, abs(expected).max()) if not offset else 1e-8
    )
    np.testing.assert_allclose(a[PAIR].mean_student, student.mean(0), rtol=1e-12, atol=1e-12)


def test_chunks_and_dtypes():
    student, teacher = gaussian(2 * CHUNK + 17, offset=3.0)
    np.testing.assert_allclose(
        covariance(seen(student, teacher)),
        np.cov(torch.cat([student, teacher], 1).numpy(), rowvar=False),
        atol=1e-10,
    )
    low = seen(student.bfloat16(), teacher.bfloat16())
    expected = np.cov(torch.cat([student.bfloat16(), teacher.bfloat16()], 1).double().numpy(), rowvar=False)
    np.testing.assert_allclose(covariance(low), expected, atol=1e-10)
    assert low[PAIR].scatter_cross.dtype == torch.float64


def test_update_leaves_its_rows_alone_and_builds_no_graph():
    student, teacher = gaussian(50)
    before, student = student.clone(), student.requires_grad_()
    moments = seen(student, teacher)
    assert torch.equal(student.detach(), before) and not moments[PAIR].scatter_student.requires_grad


PEAK = """
import sys, torch
from oprd_nb.structure import Moments
from oprd_nb.utils import measured
block = tuple(torch.randn(10_000, 576, generator=torch.Generator().manual_seed(0)) + 2 for _ in range(2))
Moments([(1, 1)], 576, 576).update((1, 1), block[0][:64], block[1][:64])
with measured() as cost:
    moments = Moments([(1, 1)], 576, 576)
    for _ in range(int(sys.argv[1])):
        moments.update((1, 1), *block)
moments.save(sys.argv[2])
print(cost.delta_peak)
"""


def peak_and_moments(times, path):
    """Peak memory of `times` passes over 10 k states of width 576 in its own process, and its moments."""
    # Freed tensors go back to the system at once and cannot hide in the heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(times), str(path)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    return int(done.stdout), Moments.load(path)


@pytest.mark.parametrize("times", [2, pytest.param(100, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_rows(times, tmp_path):
    few, _ = peak_and_moments(1, tmp_path / "few")
    many, moments = peak_and_moments(times, tmp_path / "many")
    assert few > 8 * 3 * 576**2 and many <= 1.1 * few  # the three scatters alone take 8 * 3 * 576**2 bytes
    block = np.concatenate(
        [torch.randn(10_000, 576, generator=torch.Generator().manual_seed(0)).add(2).double().numpy()] * 2, 1
    )
    expected = np.cov(block, rowvar=False) * (9_999 * times) / (10_000 * times - 1)
    assert moments[1, 1].count == 10_000 * times
    np.testing.assert_allclose(covariance(moments, (1, 1)), expected, atol=1e-10)


def test_saved_moments_come_back(tmp_path):
    student, teacher = gaussian(40)
    moments = seen(student, teacher, pairs=[(1, 1), (2, 3)])
    again = Moments.load(moments.save(tmp_path / "deep" / "m.safetensors"))
    assert again.layer_pairs == [(1, 1), (2, 3)] and not list(tmp_path.rglob("*.part"))
    for pair in again.layer_pairs:
        assert again[pair].count == 40 and torch.equal(again[pair].scatter_cross, moments[pair].scatter_cross)
    again.update((1, 1), student, teacher)  # and they go on
    assert again[1, 1].count == 80 and moments[1, 1].count == 40


def test_what_is_not_a_moments_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    (tmp_path / "torn.safetensors").write_bytes(
        seen(*gaussian(9)).save(tmp_path / "m.safetensors").read_bytes()[:200]
    )
    for name in ("other", "torn", "missing"):
        with pytest.raises(ValueError, match="path="):
            Moments.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (lambda s, t: (s, t[:-1]), "paired hidden states"),
        (lambda s, t: (t, s), "paired hidden states"),
        (lambda s, t: (s[0], t[0]), "paired hidden states"),
        (lambda s, t: (s.clone().fill_(float("inf")), t), "h_student"),
        (lambda s, t: (s, t.clone().fill_(float("nan"))), "h_teacher"),
    ],
)
def test_bad_rows_are_refused_and_change_nothing(bad, says):
    student, teacher = gaussian(2 * CHUNK)
    moments = seen(student, teacher)
    before = covariance(moments)
    with pytest.raises(ValueError, match=says):
        moments.update(PAIR, *bad(student, teacher))
    assert moments[PAIR].count == 2 * CHUNK and np.array_equal(covariance(moments), before)


def test_one_nan_in_the_last_chunk_changes_nothing():
    student, teacher = gaussian(2 * CHUNK)
    moments, spoiled = Moments([PAIR], 5, 7), teacher.clone()
    spoiled[-1, -1] = float("nan")
    with pytest.raises(ValueError, match="h_teacher"):
        moments.update(PAIR, student, spoiled)
    assert moments[PAIR].count == 0


def test_bad_arguments_name_themselves():
    student, teacher = gaussian(300)
    moments, heldout = seen(student, teacher), {PAIR: (student, teacher)}
    cases = {
        r"layer_pairs=\[\]": lambda: Moments([], 5, 7),
        r"layer_pairs=\[\(1, 1\), \(1, 1\)\]": lambda: Moments([(1, 1), (1, 1)], 5, 7),
        "d_student=0": lambda: Moments([PAIR], 0, 7),
        r"layer_pair=\(9, 9\)": lambda: moments.update((9, 9), student, teacher),
        "other:": lambda: moments.merge(Moments([PAIR], 5, 8)),
        "side='both'": lambda: pca_spectrum(moments, PAIR, "both"),
        "0 hidden states of layer pair": lambda: pca_spectrum(Moments([PAIR], 5, 7), PAIR),
        "spectrum:": lambda: effective_rank(torch.zeros(4)),
        "ridge=-1": lambda: fit_ridge(moments[PAIR], ridge=-1),
        "ridge=0": lambda: fit_ridge(seen(student[:4], teacher[:4])[PAIR], 0),
        "degrees of freedom": lambda: component_r2(seen(student[:6], teacher[:6]), PAIR, ridge=1e-6),
        r"ranks=\[0, 8\]: \[0, 8\]": lambda: rank_curve(moments, heldout, [0, 8]),
        r"ranks=\[\]": lambda: rank_curve(moments, heldout, []),
        "heldout: is empty": lambda: rank_curve(moments, {}, [1]),
        "heldout: has no states": lambda: component_r2(moments, PAIR, {}),
        "heldout: 1 states": lambda: component_r2(moments, PAIR, {PAIR: (student[:1], teacher[:1])}),
        "groups: given without": lambda: suggest_rank(moments, groups=[0, 1]),
        "groups: 1 responses": lambda: suggest_rank(moments, heldout, [0] * 300),
        "groups: 2 responses": lambda: suggest_rank(moments, heldout, [0, 1]),
        "different numbers of states": lambda: suggest_rank(
            seen(student, teacher, [(1, 1), (2, 2)]),
            {(1, 1): (student, teacher), (2, 2): (student[:9], teacher[:9])},
        ),
        "heldout: is empty, or": lambda: suggest_rank(moments, {}),
        "targets: 2 for": lambda: fit_sgd(student, teacher[:2]),
    }
    for says, call in cases.items():
        with pytest.raises(ValueError, match=says) as caught:
            call()
        assert "\n" not in str(caught.value)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 12), st.integers(0, 12))
def test_effective_rank_of_equal_eigenvalues(k, zeros):
    rank = effective_rank(torch.tensor([0.3] * k + [0.0] * zeros, dtype=torch.float64))
    assert rank.participation == pytest.approx(k) and rank.entropy == pytest.approx(k)


def test_participation_is_never_above_entropy():
    spectrum = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    rank = effective_rank(spectrum)
    assert 1 <= rank.participation <= rank.entropy <= 30


def test_spectrum_is_numpys_and_merging_keeps_the_signs():
    student, teacher = gaussian(400)
    whole = seen(student, teacher)
    halves = seen(student[200:], teacher[200:]).merge(seen(student[:200], teacher[:200]))
    np.testing.assert_allclose(
        pca_spectrum(whole, PAIR), np.linalg.eigvalsh(np.cov(teacher.T))[::-1], rtol=1e-10
    )
    a, b = fit_ridge(whole[PAIR]), fit_ridge(halves[PAIR])
    assert torch.allclose(a.directions, b.directions, atol=1e-8) and torch.allclose(
        a.weights, b.weights, atol=1e-8
    )


def test_ridge_is_the_textbooks_and_has_no_unit():
    student, teacher = gaussian(200)
    fit = fit_ridge(seen(student, teacher)[PAIR], ridge=0.3)
    x, z = student - student.mean(0), fit.teacher(teacher)
    kappa = 0.3 * x.square().sum() / 5  # n - 1 times the relative penalty
    assert torch.allclose(
        fit.weights, torch.linalg.solve(x.T @ x + kappa * torch.eye(5).double(), x.T @ z), atol=1e-10
    )
    scaled = fit_ridge(seen(1000 * student, teacher)[PAIR], ridge=0.3)
    assert torch.allclose(scaled.student(1000 * student), fit.student(student), atol=1e-9)
    hat = x @ torch.linalg.solve(x.T @ x + kappa * torch.eye(5).double(), x.T)
    assert torch.allclose(fit.degrees_of_freedom, hat.trace())


def test_a_rank_deficient_teacher_gives_finite_numbers():
    student, teacher = gaussian(300)
    teacher = teacher[:, :3] @ torch.ones(3, 7, dtype=torch.float64).tril()  # rank 3 in 7 dimensions
    table = component_r2(seen(student, teacher), PAIR, {PAIR: (student, teacher)})
    assert np.isfinite(table).all().all() and (table.rho2[3:] == 0).all()
    assert np.isfinite(rank_curve(seen(student, teacher), {PAIR: (student, teacher)}, [1, 3, 7])).all().all()


def test_fewer_rows_than_dimensions():
    student, teacher = gaussian(40, d_student=60, d_teacher=20)
    fit = fit_ridge(seen(student, teacher)[PAIR])
    assert torch.isfinite(fit.weights).all() and (fit.degrees_of_freedom < 0.8 * 40).all()


def flat_pair(count: int, width: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Independent states of a student without a preferred direction, and a linear teacher with noise."""
    draw = torch.Generator().manual_seed(seed)
    student = torch.randn(count, width, generator=draw)
    mixed = student @ torch.randn(width, width, generator=draw) / width**0.5
    return student, mixed + noise * torch.randn(count, width, generator=draw)


@pytest.mark.parametrize(
    ("width", "count", "noise"), [(24, 60, 0.7), (24, 30, 0.5), (60, 40, 0.5), (24, 240, 1.0), (60, 60, 2.0)]
)
def test_few_positions_with_a_flat_spectrum_are_not_the_worse_for_the_penalty(width, count, noise):
    student, teacher = flat_pair(count + 2000, width, noise)
    moments = seen(student[:count], teacher[:count])
    unseen = (student[count:], teacher[count:])

    def held_out_r2(ridge):
        fit = fit_ridge(moments[PAIR], ridge)
        truth = fit.teacher(unseen[1])
        return 1 - float((truth - fit.student(unseen[0])).square().sum() / truth.square().sum())

    best = max(held_out_r2(10.0**power) for power in range(-3, 4))
    assert held_out_r2(None) > best - 0.03


def test_a_rank_of_few_positions_says_that_they_are_too_few():
    student, teacher = flat_pair(60, 24, noise=3.0)
    suggested = suggest_rank(seen(student, teacher), {PAIR: flat_pair(60, 24, noise=3.0, seed=1)})
    assert suggested.rank == 0 and "too few positions: 60 were fitted" in str(suggested)
    assert "nothing to carry" not in str(suggested)
    many = suggest_rank(seen(*flat_pair(4000, 24, noise=3.0)))
    assert many.rank == 0 and not many.too_few and "nothing to carry" in str(many)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["h_student", "h_teacher"])
def test_states_that_are_not_finite_are_named(bad, side):
    states = dict(zip(("h_student", "h_teacher"), flat_pair(40, 8, 0.5), strict=True))
    states[side][3, 2] = bad
    with pytest.raises(ValueError, match=f"{side}: holds NaN or infinite"):
        Moments([PAIR], 8, 8).update(PAIR, **states)


def test_error_decomposition_is_a_distance_and_its_steps_ask_one_half():
    student, teacher = gaussian(5000)
    moments = seen(student, teacher)
    fit, errors = (
        fit_ridge(moments[PAIR], ridge=0),
        error_decomposition(moments, PAIR, {PAIR: (student, teacher)}, ridge=0),
    )
    y, said = teacher - teacher.mean(0), fit.student(student) @ fit.directions.T
    for row in errors.itertuples():
        asked = y @ fit.directions[:, : row.rank] @ fit.directions[:, : row.rank].T
        assert row.total == pytest.approx(float((asked - said).square().sum() / 5000), rel=1e-9)
    table = component_r2(moments, PAIR, {PAIR: (student, teacher)}, ridge=0)
    np.testing.assert_allclose(
        np.diff(errors.total), (table.eigenvalue * (1 - 2 * table.rho2))[1:], atol=1e-9
    )
    assert (np.diff(errors.fitting) >= -1e-12).all() and (np.diff(errors.truncation) <= 1e-12).all()


def test_rotations_change_nothing():
    rows = planted_pair(64, torch.linspace(9, 1, 12), torch.linspace(0.9, 0.1, 12), d_student=12)
    q = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0))).Q
    turned = rows.student @ q + 5
    a = rank_curve(seen(rows.student, rows.teacher), {PAIR: (rows.student, rows.teacher)}, [1, 4, 12])
    b = rank_curve(seen(turned, rows.teacher), {PAIR: (turned, rows.teacher)}, [1, 4, 12])
    np.testing.assert_allclose(
        a[["cosine", "r2", "explained_variance"]], b[["cosine", "r2", "explained_variance"]], atol=1e-5
    )


def test_shuffled_pairs_share_nothing():
    rows = planted_pair(
        256, torch.linspace(9, 1, 12), torch.full((12,), 0.9), d_student=12, response_length=16
    )
    shuffled = rows.student[torch.randperm(4096, generator=torch.Generator().manual_seed(0))]
    assert suggest_rank(seen(rows.student, rows.teacher)).rank == 12
    assert suggest_rank(seen(shuffled, rows.teacher)).rank == 0


def test_rank_curve_keeps_layers_apart():
    a = planted_pair(64, torch.linspace(9, 1, 12), torch.full((12,), 0.9), d_student=12, seed=0)
    b = planted_pair(64, torch.linspace(9, 1, 12), torch.full((12,), 0.3), d_student=12, seed=1)
    moments = Moments([(1, 1), (2, 4)], 12, 12)
    moments.update((1, 1), a.student, a.teacher)
    moments.update((2, 4), b.student, b.teacher)
    heldout = {(1, 1): (a.student, a.teacher), (2, 4): (b.student, b.teacher)}
    curve = rank_curve(moments, heldout=heldout, ranks=[8, 1])
    assert list(curve.columns[:5]) == ["layer", "rank", "cosine", "r2", "explained_variance"]
    assert (
        curve.layer.tolist() == [1, 1, 2, 2]
        and curve.teacher_layer.tolist() == [1, 1, 4, 4]
        and curve["rank"].tolist() == [8, 1, 8, 1]
    )
    assert curve.r2[0] > 0.8 > 0.5 > curve.r2[2]
    both = suggest_rank(moments, heldout, a.responses)
    assert both.layers["rank"].tolist() == [12, 0] and both.layers["low"].tolist() == [12, 0]
    assert int(both) == both.rank and "layer" in both._repr_markdown_()


@pytest.mark.parametrize("share", [0.6, 0.9])
@pytest.mark.parametrize("rank", [3, 8, 20])
def test_planted_rank_is_recovered(rank, share):
    eigenvalues = torch.cat([torch.linspace(12, 3, rank), torch.arange(1, 81 - rank) ** -0.3])
    for seed in range(3):
        rows = planted_pair(
            256, eigenvalues, torch.where(torch.arange(80) < rank, share, 0.0), d_student=64, seed=seed
        )
        first = rows.responses < 128
        moments = seen(rows.student[first], rows.teacher[first])
        found = suggest_rank(
            moments, {PAIR: (rows.student[~first], rows.teacher[~first])}, rows.responses[~first]
        )
        assert abs(found.rank - rank) <= 1 and found.low <= rank <= found.high
        assert abs(suggest_rank(moments).rank - rank) <= 1


def test_interval_repeats_with_its_seed_and_covers_blocks():
    rows = planted_pair(64, torch.linspace(9, 1, 24), torch.linspace(0.9, 0.1, 24), d_student=24)
    moments, heldout = seen(rows.student, rows.teacher), {PAIR: (rows.student, rows.teacher)}
    a, b = (suggest_rank(moments, heldout, rows.responses.tolist(), seed=3) for _ in range(2))
    assert (a.low, a.high) == (b.low, b.high) and a.low <= a.rank <= a.high and "64 responses" in str(a)
    assert "50 blocks of neighbouring states" in str(suggest_rank(moments, heldout))
    assert suggest_rank(moments).low is None


def test_recipe_at_a_small_rank_is_the_head_of_a_large_one():
    student, teacher = gaussian(600, 12, 20)
    whole = fit_sgd(student, teacher, epochs=3, batch_size=64)
    for rank in (1, 5):
        assert torch.allclose(
            fit_sgd(student, teacher[:, :rank], epochs=3, batch_size=64), whole[:rank], atol=1e-5
        )


def pooled_r2(prediction, truth):
    return 1 - (prediction - truth).square().sum(0).cumsum(0) / (truth - truth.mean(0)).square().sum(
        0
    ).cumsum(0)


@pytest.mark.parametrize(("share", "length"), [(0.95, 1), (0.6, 16)])
def test_closed_form_beats_the_recipe_at_every_rank(share, length):
    """r = 1 .. 256, same states: training error never above the recipe's; held out never 0.005 below it."""
    rows = planted_pair(
        16384 // length, 100 * torch.arange(1, 257) ** -1.2, torch.full((256,), share), 256, length, seed=11
    )
    first = rows.responses < 8192 // length
    moments = seen(rows.student[first], rows.teacher[first])
    chosen, plain = fit_ridge(moments[PAIR]), fit_ridge(moments[PAIR], ridge=1e-6)
    x, x_new = rows.student[first].double(), rows.student[~first].double()
    z, z_new = chosen.teacher(rows.teacher[first]), chosen.teacher(rows.teacher[~first])
    for rate in (1e-3, 1e-2):
        recipe = fit_sgd(
            x, z, learning_rate=rate
        ).T.double()  # holds the run at every smaller rank, as tested above
        assert (
            (plain.student(x) - z).square().mean(0).cumsum(0) <= (x @ recipe - z).square().mean(0).cumsum(0)
        ).all()
        assert (pooled_r2(chosen.student(x_new), z_new) >= pooled_r2(x_new @ recipe, z_new) - 0.005).all()
        assert (
            prefix_cosine(chosen.student(x_new), z_new).mean(0)
            >= prefix_cosine(x_new @ recipe, z_new).mean(0) - 0.005
        ).all()


def test_all_ranks_in_closed_form_cost_less_than_a_fiftieth_of_the_recipe():
    rows = planted_pair(
        256, 100 * torch.arange(1, 257) ** -1.2, torch.full((256,), 0.95), d_student=256, response_length=16
    )
    with measured() as closed:
        fit = fit_ridge(seen(rows.student, rows.teacher)[PAIR])
    with measured() as cheapest:
        fit_sgd(rows.student, fit.teacher(rows.teacher, 1))
    assert 256 * cheapest.seconds > 50 * closed.seconds  # 256 runs, each as cheap as the one at rank 1


def test_fits_made_once_give_what_fits_made_anew_give():
    student, teacher = gaussian(400)
    moments = seen(student, teacher, [(1, 1), (2, 3)])
    heldout = {(1, 1): (student, teacher), (2, 3): (student, teacher)}
    groups = torch.arange(400) // 10
    fits = fit_all(moments)
    assert list(fits) == [(1, 1), (2, 3)]
    assert rank_curve(moments, heldout, [1, 5], fits=fits).equals(rank_curve(moments, heldout, [1, 5]))
    for pair in fits:
        again = component_r2(moments, pair, heldout)
        assert component_r2(moments, pair, heldout, fits=fits).equals(again)
        again = error_decomposition(moments, pair)
        assert error_decomposition(moments, pair, fits=fits).equals(again)
    for states, labels in ((heldout, groups), (None, None)):
        given = suggest_rank(moments, states, labels, fits=fits)
        made = suggest_rank(moments, states, labels)
        assert str(given) == str(made) and given.layers.equals(made.layers)


def test_fits_that_do_not_belong_are_refused():
    student, teacher = gaussian(100)
    moments = seen(student, teacher, [(1, 1), (2, 3)])
    heldout = {(2, 3): (student, teacher)}
    fits = {(1, 1): fit_ridge(moments[1, 1])}
    with pytest.raises(ValueError, match=r"fits: has no fit of layer pair \(2, 3\)"):
        rank_curve(moments, heldout, [1], fits=fits)
    with pytest.raises(ValueError, match="ridge=0.1: fits are given"):
        rank_curve(moments, heldout, [1], ridge=0.1, fits=fit_all(moments))


@pytest.mark.parametrize("ridge", [0.0, 0.3, None])
def test_the_error_of_a_fit_is_what_it_leaves_on_its_states(ridge):
    student, teacher = gaussian(120)
    moments = seen(student, teacher)[PAIR]
    fit = fit_ridge(moments, ridge)
    left = (fit.teacher(teacher) - fit.student(student)).square().sum(0)
    total = fit.teacher(teacher).square().sum(0)
    assert torch.allclose(fit.r2, 1 - left / total, atol=1e-10)


def test_a_component_pays_where_more_than_half_of_it_is_predicted():
    variance = torch.tensor([4.0, 2.0, 1.0])
    for rho2, rank in (([0.5, 0.5, 0.5], 0), ([0.51, 0.5, 0.5], 1), ([0.6, 0.4, 0.95], 3), ([0.49] * 3, 0)):
        assert best_rank(error_decrease(variance, torch.tensor(rho2))) == rank
    assert too_few_positions(4 * 24, 24) == "" and "95 were fitted" in too_few_positions(95, 24)


def test_noise_follows_its_seed():
    arguments = (8, torch.linspace(3, 1, 6), torch.full((6,), 0.5), 6)
    first, again, other = (planted_pair(*arguments, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.student, again.student) and torch.equal(first.teacher, again.teacher)
    assert not torch.allclose(first.student, other.student)
    moments = seen(first.student, first.teacher)
    heldout = {PAIR: (first.student, first.teacher)}
    curve, repeated, changed = (rank_curve(moments, heldout, [2, 6], seed=seed) for seed in (0, 0, 1))
    assert curve.equals(repeated)
    assert (curve["cosine_untrained"] != changed["cosine_untrained"]).all()
    same = ["cosine", "r2", "explained_variance"]
    assert curve[same].equals(changed[same])


@pytest.mark.parametrize("count", [20, 40, 60, 400])
def test_the_chosen_penalty_is_that_of_the_rule_written_out(count):
    """Every penalty fitted by itself from the states, and scored as `choose_penalty` says."""
    student, teacher = flat_pair(count, 8, noise=1.0, seed=count)
    student, teacher = student.double() * torch.linspace(1, 4, 8), teacher.double()
    moments = seen(student, teacher)[PAIR]
    fit = fit_ridge(moments)
    x, z = student - student.mean(0), fit.teacher(teacher)
    covariance = x.T @ x / (count - 1)
    gamma = GCV_GAMMA - (GCV_GAMMA - 1) * min(1, SCARCE_FOR_GAMMA * 9 / count)
    weight = min(1, SCARCE_FOR_OWN * 9 / count)
    own, spent, solutions = [], [], []
    for power in range(49):
        kappa = covariance.trace() / 8 * 10 ** (4 - power / 4)
        inverse = torch.linalg.inv(covariance + kappa * torch.eye(8).double())
        solution = inverse @ (x.T @ z / (count - 1))
        degrees = (inverse @ covariance).trace()
        remaining = 1 - gamma * (1 + degrees) / count
        error = (z - x @ solution).square().mean(0)
        own.append(error / remaining**2 if remaining > LEAST_REMAINING else torch.full((8,), torch.inf))
        spent.append(degrees)
        solutions.append(solution)
    own = torch.stack(own).double()
    together = own.sum(1, keepdim=True) / own[0].sum()
    best = (weight * together + (1 - weight) * own / own[0]).argmin(0)
    assert torch.allclose(fit.degrees_of_freedom, torch.stack(spent)[best])
    expected = torch.stack([solutions[best[i]][:, i] for i in range(8)], dim=1)
    assert torch.allclose(fit.weights, expected, atol=1e-8)


def test_a_student_whose_states_never_change_has_no_unpenalised_fit():
    _, teacher = gaussian(50)
    with pytest.raises(ValueError, match="ridge=0: the student's covariance of layer pair"):
        fit_ridge(seen(torch.ones(50, 5, dtype=torch.float64), teacher)[PAIR], ridge=0)


def test_one_state_more_than_was_spent_is_enough_to_correct_r2():
    fit = fit_ridge(seen(*gaussian(200))[PAIR], ridge=0.1)
    spent = torch.full_like(fit.degrees_of_freedom, 10.0)
    corrected = replace(fit, count=12, degrees_of_freedom=spent).adjusted_r2()
    assert torch.allclose(corrected, (1 - (1 - fit.r2) * 11).clamp(min=0))
    with pytest.raises(ValueError, match="too few positions: 11 states for 10 degrees"):
        replace(fit, count=11, degrees_of_freedom=spent).adjusted_r2()


def test_the_cosine_of_small_states_is_that_of_large_ones():
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = [torch.nn.functional.cosine_similarity(a[:, :r], b[:, :r]) for r in range(1, 5)]
    for size in (1.0, 1e-6):
        assert torch.allclose(prefix_cosine(size * a, size * b), torch.stack(expected, dim=1))
    assert (prefix_cosine(torch.zeros(2, 3), torch.ones(2, 3)) == 0).all()


def test_the_recipe_begins_between_minus_and_plus_one_over_the_root_of_the_width():
    start = fit_sgd(torch.ones(4, 25), torch.ones(4, 40), epochs=0)
    assert start.abs().max() <= 0.2 and start.min() < -0.15 and start.max() > 0.15
    assert abs(float(start.mean())) < 0.02


def test_the_decrease_of_the_error_is_a_share_of_all_variance():
    """(3 (2 x 0.75 - 1), 1 (2 x 0.5 - 1)) / 4, and rho^2 outside 0 to 1 counts as its nearer end."""
    decrease = error_decrease(torch.tensor([3.0, 1.0]), torch.tensor([0.75, 0.5]))
    assert decrease.tolist() == [0.375, 0.0]
    assert error_decrease(torch.tensor([3.0, 1.0]), torch.tensor([1.2, -0.5])).tolist() == [0.75, -0.25]


def test_two_groups_are_enough_and_one_is_not():
    assert group_index([7, 7, 9], 3).tolist() == [0, 0, 1]
    for groups in ([7, 7, 7], [7, 9]):
        with pytest.raises(ValueError, match="at least two responses"):
            group_index(groups, 3)
    assert group_index(None, 3).tolist() == [0, 1, 2]
    assert group_index(None, 100).bincount().tolist() == [2] * 50


def test_planted_students_have_the_spectrum_of_a_power_law():
    """Standard deviations fall as the component's number to the power of -3/4; their mean square is 1."""
    rows = planted_pair(4096, torch.linspace(9, 1, 6), torch.full((6,), 0.5), d_student=6, response_length=8)
    spectrum = torch.linalg.eigvalsh(torch.cov(rows.student.double().T)).flip(0)
    expected = torch.arange(1, 7, dtype=torch.float64) ** -1.5
    assert torch.allclose(spectrum, expected / expected.mean(), rtol=0.1)


def test_stored_moments_that_have_seen_nothing_are_accepted():
    check_stored(PairMoments.empty(2, 3), 0, {})
    with pytest.raises(ValueError, match="counts: -1"):
        check_stored(PairMoments.empty(2, 3), -1, {})
