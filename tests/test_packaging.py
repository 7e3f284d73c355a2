"""What is released: the files of the wheel and of the source archive, the citation, the licence, the site."""

import configparser
import importlib.util
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
SITE_NEEDS = ("sphinx", "myst_nb", "furo", "latex2mathml")


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The wheel and the source archive of this tree, built without a network."""
    out = tmp_path_factory.mktemp("dist")
    copy = tmp_path_factory.mktemp("tree")
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in tracked.stdout.splitlines():
        if name.startswith(("nbs/", "tests/", "examples/")) or not (ROOT / name).is_file():
            continue
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((ROOT / name).read_bytes())
    program = f"from setuptools.build_meta import *; build_wheel({str(out)!r}); build_sdist({str(out)!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_holds_every_module_the_embedded_models_and_the_mark_of_types(archives):
    with zipfile.ZipFile(archives[0]) as wheel:
        inside = set(wheel.namelist())
        metadata = wheel.read(next(name for name in inside if name.endswith("METADATA"))).decode()
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "oprd_nb").rglob("*.py")}
    embedded = {p.relative_to(ROOT).as_posix() for p in (ROOT / "oprd_nb/embedded").rglob("*") if p.is_file()}
    assert package | embedded | {"oprd_nb/py.typed"} <= inside
    assert not [name for name in inside if name.startswith(("nbs/", "tests/"))]
    assert any(name.endswith("entry_points.txt") for name in inside)
    assert any(name.endswith("LICENSE") for name in inside)
    assert "License-Expression: Apache-2.0" in metadata or "License: Apache-2.0" in metadata


def test_the_source_archive_can_be_built_again(archives, tmp_path):
    shutil.unpack_archive(archives[1], tmp_path)  # `filter="data"` of tarfile is newer than Python 3.11.0
    folder = next(tmp_path.iterdir())
    program = f"from setuptools.build_meta import *; build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as again, zipfile.ZipFile(archives[0]) as wheel:
        assert sorted(again.namelist()) == sorted(wheel.namelist())


def test_the_citation_names_the_paper_and_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    settings = configparser.ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini")
    assert citation["version"] == settings["DEFAULT"]["version"]
    assert citation["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    paper = citation["preferred-citation"]
    assert paper["url"] == "https://arxiv.org/abs/2606.06021"
    assert len(paper["authors"]) == 10


def test_workflows_run_what_the_makefile_has():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
        used = [match[1] for step in steps if (match := re.match(r"make ([\w-]+)$", step.get("run", "")))]
        assert set(used) <= targets, path.name


def test_what_a_page_of_the_site_refers_to_is_found_or_named(tmp_path):
    check_site = pytest.importorskip("check_site")
    (tmp_path / "b.html").write_text("<h1 id='here'>B</h1>")
    links = "<a href='b.html#here'>B</a><a href='b.html#there'>B</a><a href='c.html'>C</a>"
    text = f"{links}<img src='https://example.org/z'>"
    (tmp_path / "a.html").write_text(text)
    broken = list(check_site.broken_links(check_site.read_pages(tmp_path)))
    assert [line.split(": ")[1] for line in broken] == [
        "b.html#there has no such place",
        "c.html leads nowhere",
        "fetches https://example.org/z",
    ]


@pytest.mark.slow
@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in SITE_NEEDS), reason="needs the extra docs"
)
def test_the_site_has_every_notebook_and_name_and_no_broken_link(tmp_path):
    import build_docs
    import check_site

    assert check_site.problems(build_docs.build(tmp_path)) == []
