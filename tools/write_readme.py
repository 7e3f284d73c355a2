"""Write README.md from nbs/index.ipynb: its text and the code of its examples, without saved outputs.

Cells flagged `#| echo: false` draw a figure; they are left out.
"""

import sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent


def readme() -> str:
    """README's text."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    notebook.metadata["language_info"] = {"name": "python"}
    notebook.cells = [cell for cell in notebook.cells if not cell.source.startswith("#| echo: false")]
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    return MarkdownExporter().from_notebook_node(notebook)[0].strip() + "\n"


if __name__ == "__main__":
    if "--print" in sys.argv:
        sys.stdout.write(readme())
    else:
        (ROOT / "README.md").write_text(readme())
