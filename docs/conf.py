"""The site: pages from the notebooks with their saved pictures, and the reference from docstrings."""

import os
import re
import sys
from configparser import ConfigParser
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

# This file is read from a copy: tools/build_docs.py says where the repository is.
ROOT = Path(os.environ["OPRD_ROOT"])
sys.path.insert(0, str(ROOT))
settings = ConfigParser(delimiters=["="])
settings.read(ROOT / "settings.ini")

project = settings["DEFAULT"]["title"]
copyright = settings["DEFAULT"]["copyright"]
release = settings["DEFAULT"]["version"]
html_title = project
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["live.js"]
html_copy_source = False
html_show_sourcelink = False

# Pages show what is saved in the notebooks: nothing is run.
nb_execution_mode = "off"
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 4
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "misc.highlighting_failure"]
# Browsers draw MathML themselves: no script, no network.
html_math_renderer = "mathml"

default_role = "code"
add_module_names = False
viewcode_follow_imported_members = False
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": True, "show-inheritance": True}
autodoc_typehints_format = "short"
python_display_short_literal_types = True


def as_plain_text(app, what, name, obj, options, lines):
    """Docstrings are prose with code in backticks: `*` and `|` outside of them are no markup."""
    for number, line in enumerate(lines):
        parts = re.split(r"(`+[^`]*`+)", line)
        parts[::2] = [re.sub(r"([*|_])", r"\\\1", part) for part in parts[::2]]
        lines[number] = "".join(parts)


def write_inline(writer, node):
    """A formula in a line of text."""
    writer.body.append(convert(node.astext()))
    raise SkipNode


def write_block(writer, node):
    """A formula on its own line."""
    writer.body.append(f"<div class='formula'>{convert(node.astext(), display='block')}</div>")
    raise SkipNode


def setup(app):
    """Register what is above."""
    app.add_html_math_renderer("mathml", (write_inline, None), (write_block, None))
    app.connect("autodoc-process-docstring", as_plain_text)
