"""Write README.md from nbs/index.ipynb: its text and the code of its examples, without saved outputs.

Before that, each row of the index's map gets a link to every notebook of its folder. Cells flagged
`#| echo: false` draw a figure; they are left out. Links are turned to where README.md is.
"""

import json
import re
import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ROOT / "nbs"


def linked(row: str) -> str:
    """A row of the map with a link to each notebook that its first column names, or to each of a folder."""
    match = re.match(r"\| ((?:`[^`|]+`(?:, )?)+)[^|]*\|", row)
    if match is None:
        return row
    links = []
    for name in re.findall(r"`([^`]+)`", match[1]):
        if (NOTEBOOKS / f"{name}.ipynb").exists():
            links.append(f"[{name.split('_')[0]}]({name}.ipynb)")
        inside = sorted((NOTEBOOKS / name).glob("*.ipynb"))
        links += [f"[{number}]({name}/{path.name})" for number, path in enumerate(inside, 1)]
    return f"| {match[1]} {' '.join(links)} |{row[match.end() :]}"


def link_map() -> None:
    """Write the links of the map into nbs/index.ipynb, where any is missing or old."""
    path = NOTEBOOKS / "index.ipynb"
    notebook = json.loads(path.read_text("utf-8"))
    before = json.dumps(notebook)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            lines = "".join(cell["source"]).split("\n")
            cell["source"] = "\n".join(map(linked, lines)).splitlines(keepends=True)
    if json.dumps(notebook) != before:
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")


def from_root(match: re.Match) -> str:
    """A link of `nbs/index.ipynb` as it is written from the root of the repository."""
    target = match[1]
    if target.startswith("../"):
        target = target.removeprefix("../")
    elif target.endswith(".ipynb"):
        target = f"nbs/{target}"
    return f"]({target})"


def readme() -> str:
    """README's text."""
    notebook = nbformat.read(NOTEBOOKS / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("#| echo: false")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    text = MarkdownExporter().from_notebook_node(notebook)[0].strip() + "\n"
    return re.sub(r"\]\(((?:\.\./)?[\w./-]+)\)", from_root, text)


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(readme())
    else:
        link_map()
        (ROOT / "README.md").write_text(readme())
