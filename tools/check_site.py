"""Check a built site: `python tools/check_site.py build/docs/html` exits 1 and names what is wrong with it.

Every internal link and file leads somewhere, every notebook has a page, every public name is on one, and the
search index knows them. Links to other sites are not followed.
"""

import importlib
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from build_docs import modules, notebooks


class Page(HTMLParser):
    """The addresses that a page refers to, and the places on it that can be referred to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.files: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        """Collect links, files and anchors."""
        named = dict(attributes)
        for name in ("id", "name"):
            if named.get(name):
                self.anchors.add(named[name])
        if tag == "a" and named.get("href"):
            self.links.append(named["href"])
        for name in ("src", "href"):
            if tag in ("script", "img", "link") and named.get(name):
                self.files.append(named[name])


def read_pages(site: Path) -> dict[Path, Page]:
    """Every page by its path."""
    return {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}


def broken_links(pages: dict[Path, Page]) -> Iterator[str]:
    """Internal links that lead nowhere, and files that are missing or would come from a network."""
    for path, page in pages.items():
        for address in [*page.links, *page.files]:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.files and parts.scheme != "data":
                    yield f"{path}: fetches {address}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path.resolve()
            if not target.is_file():
                yield f"{path}: {address} leads nowhere"
            elif parts.fragment and target.suffix == ".html":
                known = pages.get(target)
                if known is not None and unquote(parts.fragment) not in known.anchors:
                    yield f"{path}: {address} has no such place"


def missing_notebooks(site: Path) -> Iterator[str]:
    """Notebooks without a page."""
    for path in notebooks():
        if not (site / path.with_suffix(".html")).is_file():
            yield f"nbs/{path}: has no page"


def missing_names(site: Path, pages: dict[Path, Page]) -> Iterator[str]:
    """Public names that the reference does not describe."""
    for name in modules():
        page = site / "api" / f"{name}.html"
        if not page.is_file():
            yield f"{name}: has no page"
            continue
        module = importlib.import_module(name)
        text = page.read_text("utf-8")
        for public in getattr(module, "__all__", []):
            if not re.search(rf"\b{re.escape(public)}\b", text):
                yield f"{name}.{public}: is not on its page"


def missing_in_search(
    site: Path, words: tuple[str, ...] = ("Representation", "OPRDTrainer", "Moments")
) -> Iterator[str]:
    """Names that the search would not find as objects."""
    text = (site / "searchindex.js").read_text("utf-8")
    index = json.loads(text[text.index("(") + 1 : text.rindex(")")])
    objects = {entry[-1] for entries in index["objects"].values() for entry in entries}
    for word in words:
        if word not in objects:
            yield f"search: does not find {word}"


def problems(site: Path) -> list[str]:
    """Everything that is wrong with a site."""
    pages = read_pages(site.resolve())
    found = [
        *broken_links(pages),
        *missing_notebooks(site),
        *missing_names(site, pages),
        *missing_in_search(site),
    ]
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = problems(folder)
    print("\n".join(found[:50]))
    if found:
        sys.exit(f"{len(found)} problems")
    print(f"{len(list(folder.rglob('*.html')))} pages, {len(notebooks())} notebooks, no broken link")
