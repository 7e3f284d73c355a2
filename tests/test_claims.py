"""Claims: what is stored is read as it is, and the interval alone decides."""

import json

import pandas as pd
import pytest

from oprd_nb.claims import (
    CLAIMS,
    COLUMNS,
    FAILS,
    HOLDS,
    NOT_MEASURED,
    OUT_OF_REACH,
    SCALES,
    UNDECIDED,
    Claim,
    Evidence,
    Measured,
    claims_table,
    gain_of,
    gap_of,
    memory_saved,
    missing_commands,
    ratio_collapse,
)
from oprd_nb.cli import main
from oprd_nb.cli.reproduce import argv_of, run_missing


def sweep(path, **accuracies):
    """A table of runs: method -> accuracy by seed; a validation run of each that must not count."""
    rows = []
    for method, values in accuracies.items():
        rows.append({"method": method, "seed": 0, "split": "validation", "before": 0.9, "accuracy": 0.9})
        rows += [
            {"method": method, "seed": seed, "split": "test", "before": 0.1, "accuracy": value}
            for seed, value in enumerate(values, start=1)
        ]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(
    ("values", "verdict"),
    [([0.5, 0.52, 0.51], HOLDS), ([0.2, 0.22, 0.21], FAILS), ([0.2, 0.5, 0.32], UNDECIDED)],
)
def test_the_interval_decides(tmp_path, values, verdict):
    path = sweep(tmp_path / "runs.csv", oprd=values, other=[0.3, 0.32, 0.31])
    assert gap_of(path, "oprd", "other").verdict == verdict


def test_a_gap_is_paired_by_seed_and_in_points(tmp_path):
    """Seeds differ by 30 points and the methods by two in each: mean 2, no width."""
    path = sweep(tmp_path / "runs.csv", oprd=[0.32, 0.62, 0.47], other=[0.30, 0.60, 0.45])
    found = gap_of(path, "oprd", "other")
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))
    assert found.text == "47.0 against 45.0 %"
    assert gain_of(path, "oprd").value == pytest.approx(37)


def test_one_seed_decides_nothing(tmp_path):
    assert gain_of(sweep(tmp_path / "runs.csv", oprd=[0.9]), "oprd").verdict == UNDECIDED
    with pytest.raises(ValueError, match="needs at least 2"):
        gap_of(sweep(tmp_path / "runs.csv", oprd=[0.9], other=[0.1]), "oprd", "other")


def test_memory_is_a_share_of_the_others(tmp_path):
    peaks = [{"method": "oprd", "delta_peak": 25}, {"method": "topk", "delta_peak": 100}]
    path = tmp_path / "peaks.json"
    path.write_text(json.dumps({"machine": "one", "peaks": peaks}))
    assert memory_saved(path, "oprd", "topk").value == 75


@pytest.mark.parametrize(("power", "verdict"), [(0.02, FAILS), (1.0, HOLDS)])
def test_a_power_of_the_divergence_is_fitted(tmp_path, power, verdict):
    """signal / noise = divergence ** power, with a little disorder, so that the slope has an error."""
    rows = []
    for divergence, factor in zip((1e-4, 1e-3, 1e-2, 1e-1, 1.0), (1.01, 0.99, 1.0, 1.01, 50), strict=True):
        ratio = factor * divergence**power
        rows.append({"divergence": divergence, "term": "full KL", "signal": ratio, "noise": 0})
        rows.append({"divergence": divergence, "term": "sampled token", "signal": 1, "noise": 1})
    path = tmp_path / "noise.csv"
    pd.DataFrame(rows).to_csv(path, index=False)
    found = ratio_collapse(path)
    assert found.value + 0.5 == pytest.approx(power, abs=0.01) and found.verdict == verdict


def test_every_claim_has_a_row_at_every_scale():
    for scale in SCALES:
        table = claims_table(scale)
        assert list(table.columns) == COLUMNS and len(table) == len(CLAIMS)
        measured = ~table["verdict"].isin([NOT_MEASURED, OUT_OF_REACH])
        assert table.loc[measured, ["difference", "low", "high", "here", "command"]].notna().all(axis=None)
    assert len({claim.sentence for claim in CLAIMS}) == len(CLAIMS)


def test_a_table_from_a_new_sweep_is_read_like_the_stored_one(tmp_path):
    (tmp_path / "same").mkdir()
    sweep(
        tmp_path / "same" / "sweep.csv",
        **{"oprd": [0.9, 0.8], "opd-full": [0.5, 0.4], "opd-sampled": [0.3, 0.2]},
    )
    table = claims_table("embedded", tmp_path).set_index("claim")
    assert table.loc["OPRD is better than OPD on the sampled token", "here"] == "85.0 against 25.0 %"


def test_missing_commands_come_once_and_name_the_folder(tmp_path):
    claim = Claim(
        "a", "b", "c", {"small": Evidence(("x.csv",), lambda path: Measured("", 1, 1, 1), ("make {out}",))}
    )
    assert missing_commands("small", tmp_path, [claim, claim]) == [f"make {tmp_path}"]
    (tmp_path / "x.csv").touch()
    assert missing_commands("small", tmp_path, [claim, claim]) == []
    assert len(missing_commands("paper", tmp_path)) == 3


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match="scale='large'"):
        claims_table("large")
    with pytest.raises(ValueError, match="scale='large'"):
        missing_commands("large", ".")
    assert main(["reproduce", "--scale", "large"]) == 2


def test_the_command_prints_and_stores(tmp_path, capsys):
    assert main(["reproduce", "--scale", "small", "--out", str(tmp_path / "claims.csv")]) == 0
    printed = capsys.readouterr().out
    assert "HOLDS HERE: OPRD improves the student (Table 2)" in printed
    assert len(pd.read_csv(tmp_path / "claims.csv")) == len(CLAIMS)
    assert main(["reproduce", "--results", str(tmp_path)]) == 0
    assert "--run True runs it" in capsys.readouterr().out


def test_commands_run_in_order_and_the_first_failure_ends_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "good.py").write_text("open('made', 'w').close()")
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    with pytest.raises(ValueError, match="exit code 3: python bad.py"):
        run_missing(["python good.py", "python bad.py", "python good.py never"])
    assert (tmp_path / "made").exists()
    assert capsys.readouterr().out.splitlines()[-1] == "2 of 3: python bad.py"
    with pytest.raises(ValueError, match="gone.py is not here; run this inside a checkout"):
        run_missing(["python gone.py"])
    assert argv_of("oprd probe x")[1:] == ["-m", "oprd_nb", "probe", "x"]
