"""Build the site from notebooks and docstrings, without a network: `python tools/build_docs.py build/docs`.

Notebooks are copied without nbdev's directives; saved figures become live ones that start as their picture.
"""

import importlib
import json
import os
import pkgutil
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path

import nbformat
from plotly.offline import get_plotlyjs

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "oprd_nb"
PLOTLY = "application/vnd.plotly.v1+json"


def notebooks() -> list[Path]:
    """Every notebook in reading order, relative to `nbs`."""
    found = (path.relative_to(ROOT / "nbs") for path in (ROOT / "nbs").rglob("*.ipynb"))
    return sorted(path for path in found if not any(part.startswith(".") for part in path.parts))


def live_html(output: dict) -> str:
    """A saved plotly figure as its picture, with the data from which `live.js` draws it."""
    figure = output["data"][PLOTLY]
    # Without a `<` no text in the figure can end the script element.
    text = json.dumps({"data": figure["data"], "layout": figure["layout"]}).replace("<", "\\u003c")
    picture = output["data"].get("image/png", "").replace("\n", "")
    title = escape(str(figure["layout"].get("meta", {}).get("title", "figure")), quote=True)
    image = f"<img alt='{title}' src='data:image/png;base64,{picture}'>" if picture else ""
    return f"<div class='live'>{image}<script type='application/json'>{text}</script></div>"


def page_of(path: Path) -> nbformat.NotebookNode:
    """One notebook as the site shows it."""
    notebook = nbformat.read(ROOT / "nbs" / path, as_version=4)
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            if any(line.startswith("#| default_exp") for line in lines):
                continue
            hides_code = any(line.startswith("#| echo: false") for line in lines)
            cell.source = "\n".join(line for line in lines if not line.startswith("#|")).strip()
            if hides_code:
                cell.metadata["tags"] = ["remove-input"]
            for output in cell.outputs:
                if PLOTLY in output.get("data", {}):
                    output["data"] = {"text/html": live_html(output)}
        cells.append(cell)
    notebook.cells = cells
    return notebook


def modules() -> list[str]:
    """Every module and package below the package, by its dotted name, without what begins with `_`."""
    package = importlib.import_module(PACKAGE)
    found = [entry.name for entry in pkgutil.walk_packages(package.__path__, f"{PACKAGE}.")]
    return [PACKAGE, *sorted(name for name in found if not any(part[0] == "_" for part in name.split(".")))]


def undocumented_data(name: str) -> str:
    """The constants of a module that have no docstring, which autodoc leaves out."""
    from sphinx.pycode import ModuleAnalyzer  # here: checking a site needs no Sphinx

    module = importlib.import_module(name)
    documented = {attribute for _, attribute in ModuleAnalyzer.for_module(name).find_attr_docs()}
    text = ""
    for public in getattr(module, "__all__", []):
        value = getattr(module, public)
        is_defined_here = getattr(value, "__module__", None) == name and hasattr(value, "__qualname__")
        if not is_defined_here and public not in documented:
            text += f"\n.. py:data:: {public}\n   :type: {type(value).__name__}\n"
    return text


def reference_page(name: str) -> str:
    """The page of one module: what its docstrings say; of a package, the names that it offers."""
    module = importlib.import_module(name)
    title = f"{name}\n{'=' * len(name)}\n\n"
    if not hasattr(module, "__path__"):
        return f"{title}.. automodule:: {name}\n{undocumented_data(name)}"
    lines = [title, f"{(module.__doc__ or '').strip()}\n"]
    for offered in getattr(module, "__all__", []):
        value = getattr(module, offered)
        home = getattr(value, "__module__", None)
        known = isinstance(home, str) and home.startswith(PACKAGE)
        lines.append(f"- :py:obj:`{offered} <{home}.{offered}>`" if known else f"- ``{offered}``")
    return "\n".join(lines) + "\n"


def toctree(caption: str, pages: list[str]) -> str:
    """A hidden table of contents in Markdown."""
    return "\n".join(["```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```", "", ""])


def contents() -> str:
    """All tables of contents: the notebooks by part, the tutorials, and the reference."""
    names = [path.with_suffix("").as_posix() for path in notebooks() if path.name != "index.ipynb"]
    tutorials = [name for name in names if name.startswith("tutorials/")]
    chapters = [name for name in names if name not in tutorials]
    text = toctree("Tutorials", tutorials) + toctree("Notebooks", chapters)
    return text + toctree("Reference", [f"api/{name}" for name in modules()] + ["CONTRIBUTING", "CHANGELOG"])


def write_source(source: Path) -> None:
    """Everything that Sphinx reads, in `source`."""
    shutil.rmtree(source, ignore_errors=True)
    shutil.copytree(ROOT / "docs", source)
    (source / "_static" / "plotly.min.js").write_text(get_plotlyjs(), encoding="utf-8")
    for path in notebooks():
        page = page_of(path)
        if path.name == "index.ipynb":
            for cell in page.cells:
                if cell.cell_type == "markdown":
                    cell.source = cell.source.replace("](../docs/", "](").replace("](../", "](")
            page.cells.append(nbformat.v4.new_markdown_cell(contents()))
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(page, source / path)
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    (source / "api").mkdir()
    for name in modules():
        (source / "api" / f"{name}.rst").write_text(reference_page(name), encoding="utf-8")


def build(folder: Path) -> Path:
    """Build the site into `folder`/html and return that path."""
    source = folder / "source"
    html = folder / "html"
    shutil.rmtree(html, ignore_errors=True)
    write_source(source)
    command = [sys.executable, "-m", "sphinx", "-q", "-j", "2", "-b", "html", str(source), str(html)]
    subprocess.run(command, check=True, env=os.environ | {"OPRD_ROOT": str(ROOT)})
    return html


if __name__ == "__main__":
    print(f"site: {build(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / 'build' / 'docs')}")
