"""Every notebook runs from top to bottom, counted one by one; and what is saved in it is small and clean."""

import json
import os
import subprocess
import sys

import pytest
from check_sync import ROOT, differing
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_runs(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", [str(path.parent), *sys.path])
    passed, seconds = run_notebook(path, skip_flags=get_config().tst_flags.split())
    assert passed, f"{path.name} failed after {seconds:.0f} s; its traceback is above"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_notebook_is_small_and_clean(path):
    content = json.loads(path.read_text())
    assert path.stat().st_size <= 400_000
    assert "widgets" not in content["metadata"]
    errors = [
        o
        for c in content["cells"]
        if c["cell_type"] == "code"
        for o in c["outputs"]
        if o["output_type"] == "error"
    ]
    assert not errors


def test_package_and_notebooks_agree():
    assert differing() == []


def test_readme_is_the_index_notebook():
    written = subprocess.run(
        [sys.executable, ROOT / "tools" / "write_readme.py", "--print"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ,
    ).stdout
    assert (ROOT / "README.md").read_text() == written


def test_exported_cells_stay_short():
    long = {
        f"{path.name}: {''.join(c['source']).splitlines()[1]}": n
        for path in NOTEBOOKS
        for c in json.loads(path.read_text())["cells"]
        if c["cell_type"] == "code"
        and "".join(c["source"]).startswith("#| export")
        and (n := len("".join(c["source"]).splitlines())) > 60
    }
    assert not long


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.relative_to(ROOT / "nbs")))
def test_a_cell_that_shows_a_figure_is_saved_with_its_picture(path):
    cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
    missing = []
    for number, cell in enumerate(cells):
        lines = "".join(cell["source"]).strip().splitlines() or [""]
        shown = [output.get("data", {}) for output in cell["outputs"]]
        has_picture = any("image/png" in data for data in shown)
        is_drawn = any("plotly" in kind for data in shown for kind in data)
        shows_a_figure = lines[-1] in ("fig", "figure") or lines[-1].startswith("fig.update_layout(")
        if (is_drawn or shows_a_figure) and not has_picture:
            missing.append(number)
    assert not missing
