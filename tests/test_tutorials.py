"""The form of every tutorial: what one can do after it, its time and needs, a badge, parameters, an end."""

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "nbs" / "tutorials"
TUTORIALS = sorted(FOLDER.glob("*.ipynb"))


def cells_of(path):
    return json.loads(path.read_text("utf-8"))["cells"]


def source(cell):
    return "".join(cell["source"])


@pytest.fixture(params=TUTORIALS, ids=lambda path: path.stem)
def tutorial(request):
    return request.param


def test_it_opens_with_what_one_will_be_able_to_do(tutorial):
    opening = source(cells_of(tutorial)[0])
    lines = [line for line in opening.splitlines() if line]
    assert lines[0].startswith("# ")
    assert lines[1].startswith("> ")
    for start in ("* **After it** you can ", "* **Time**: ", "* **Needs**: "):
        assert len([line for line in lines if line.startswith(start)]) == 1, start


def test_its_badge_opens_this_very_notebook(tutorial):
    opening = source(cells_of(tutorial)[0])
    assert opening.count("[![Open in Colab][badge]][colab]") == 1
    links = re.findall(r"^\[colab\]: (\S+)$", opening, flags=re.M)
    assert len(links) == 1
    assert links[0].endswith(f"/blob/main/nbs/tutorials/{tutorial.name}")


def test_it_has_one_cell_of_parameters_and_uses_them(tutorial):
    cells = [cell for cell in cells_of(tutorial) if cell["cell_type"] == "code"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    assert len(tagged) == 1
    names = re.findall(r"^([A-Z_]+) = ", source(tagged[0]), flags=re.M)
    assert names
    rest = "\n".join(source(cell) for cell in cells if cell is not tagged[0])
    for name in names:
        assert re.search(rf"\b{name}\b", rest), f"{name} is set and not used"


def test_it_ends_with_three_things_to_try(tutorial):
    end = source(cells_of(tutorial)[-1])
    assert end.startswith("## Three things to try")
    assert re.findall(r"^(\d)\. ", end, flags=re.M) == ["1", "2", "3"]
