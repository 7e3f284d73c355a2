"""The index names every notebook, its paths name what exists, and links between notebooks work."""

import json
import re

import pandas as pd
import pytest
from notebook_graph import NOTEBOOKS, ROOT, Modules, all_notebooks, in_reading_order

from oprd_nb.plots.sweeps import over_seeds, style_of
from oprd_nb.utils import t_interval

INDEX = NOTEBOOKS / "index.ipynb"
LINK = re.compile(r"\]\(([^)#\s]+\.(?:ipynb|md|py))(?:#[^)]*)?\)")


def prose(path) -> str:
    """All Markdown of a notebook."""
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def test_the_map_names_every_notebook():
    table = [line for line in prose(INDEX).splitlines() if line.startswith("| `")]
    named = set(re.findall(r"`([0-9]{2}\w+)`", "\n".join(table)))
    there = {str(book.name).removesuffix(".ipynb").split("/")[0] for book in in_reading_order()}
    assert named == there


def test_the_tutorials_are_named():
    tutorials = {path.stem for path in (NOTEBOOKS / "tutorials").glob("*.ipynb")}
    assert tutorials <= set(re.findall(r"`(\w+)`", prose(INDEX)))


def test_the_three_paths_name_what_the_package_defines():
    text = prose(INDEX)
    section = text[text.index("### Three paths") : text.index("A run folder is plain")]
    sources = "\n".join(path.read_text() for path in Modules().files.values())
    defined = set(re.findall(r"^\s*(?:def|class) (\w+)", sources, re.MULTILINE))
    named = [word for quoted in re.findall(r"`([^`]+)`", section) for word in re.findall(r"\w+", quoted)]
    ignored = {"metrics", "jsonl", "bridge"}
    missing = [word for word in named if word not in defined | ignored]
    assert named and not missing


@pytest.mark.parametrize("book", all_notebooks(), ids=lambda book: str(book.name))
def test_links_between_notebooks_lead_somewhere(book):
    path = NOTEBOOKS / book.name
    broken = [target for target in LINK.findall(prose(path)) if not target.startswith("http")]
    places = [path.parent, ROOT] if path == INDEX else [path.parent]
    assert not [target for target in broken if not any((place / target).exists() for place in places)]


def test_notebooks_named_in_prose_exist():
    there = {str(book.name).removesuffix(".ipynb") for book in all_notebooks()}
    there |= {name.split("/")[0] for name in there}
    wrong = []
    for book in all_notebooks():
        named = re.findall(r"`(\d\d[a-z]?_[\w/]+)`", prose(NOTEBOOKS / book.name))
        folder = str(book.name).rpartition("/")[0]
        known = there | {name.removeprefix(f"{folder}/") for name in there if folder}
        wrong += [f"{book.name}: {name}" for name in named if name.rstrip("/") not in known]
    assert not wrong


def test_every_notebook_is_linked():
    linked = set(LINK.findall(prose(INDEX)))
    there = {str(book.name) for book in all_notebooks()} - {"index.ipynb"}
    assert there <= linked


def test_readme_s_links_lead_somewhere():
    targets = re.findall(r"\]\(([^)#\s]+)\)", (ROOT / "README.md").read_text())
    assert len(targets) > 60
    assert not [target for target in targets if "://" not in target and not (ROOT / target).exists()]


def place_of(heading: str) -> str:
    """The address that GitHub and the site give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("path", [INDEX, *sorted(ROOT.glob("*.md"))], ids=lambda path: path.name)
def test_links_within_a_page_lead_to_a_heading(path):
    text = prose(path) if path == INDEX else path.read_text()
    there = {place_of(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)\s]+)\)", text)) <= there


def results_of(path):
    """The runs of a stored table that are measured on test problems, by method."""
    runs = pd.read_csv(ROOT / "nbs" / "results" / path)
    return over_seeds(runs[runs["split"] == "test"] if "split" in runs else runs)


@pytest.mark.parametrize("path", ["same_final.csv", "real/runs.csv"])
def test_readme_s_results_are_those_that_are_stored(path):
    rows = results_of(path)
    text = (ROOT / "README.md").read_text()
    for row in rows.itertuples():
        interval = f"{100 * row.low:.1f}–{100 * row.high:.1f}"
        numbers = f"{row.learning_rate:g} | {row.accuracy:.1%} | {interval} |"
        assert f"| {style_of(row.method).label} | {numbers}" in text
    assert f"The student starts at {100 * rows['before'].mean():.1f} %" in " ".join(text.split())


def test_readme_s_teacher_of_the_real_pair_is_the_one_measured():
    pair = pd.read_csv(ROOT / "nbs" / "results" / "real" / "pair.csv", index_col="role")
    text = " ".join((ROOT / "README.md").read_text().split())
    assert f"the teacher has {100 * pair.value['teacher']:.1f} %" in text


def test_readme_s_longer_run_is_the_one_measured():
    runs = pd.read_csv(ROOT / "nbs" / "results" / "real" / "long.csv")
    assert len(runs) >= 3
    accuracy, low, high = (100 * number for number in t_interval(runs["accuracy"]))
    text = " ".join((ROOT / "README.md").read_text().split())
    before = f"takes the student from {100 * runs['before'].mean():.1f} %"
    assert f"In {runs['steps'].iloc[0]} steps OPRD {before} to" in text
    assert f"to {accuracy:.1f} % (three seeds, {low:.1f}–{high:.1f}; teacher" in text
    assert f"teacher {100 * runs['teacher'].mean():.1f} %)" in text
