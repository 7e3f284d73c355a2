"""Export every notebook into a copy and compare: exits 1, naming the files that disagree."""

import filecmp
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def program(command: str) -> Path:
    """A command of nbdev beside this Python: nbdev 3 writes its name with hyphens."""
    path = Path(sys.executable).parent / command
    return path if path.exists() else path.with_name(command.replace("_", "-"))


def is_same(first: Path, second: Path) -> bool:
    """Whether two files agree. Of nbdev's index only the names: nbdev 3 keeps no address in it."""
    if first.name == "_modidx.py":
        return runpy.run_path(str(first))["d"]["syms"] == runpy.run_path(str(second))["d"]["syms"]
    return filecmp.cmp(first, second, shallow=False)


def differing() -> list[str]:
    """Files of `nbs` and `oprd_nb` that cleaning and exporting would change."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        ignored = shutil.ignore_patterns("__pycache__", "embedded", ".ipynb_checkpoints")
        for part in ("nbs", "oprd_nb"):
            shutil.copytree(ROOT / part, copy / part, ignore=ignored)
        for file in ("settings.ini", "setup.py", "pyproject.toml", "README.md"):
            shutil.copy(ROOT / file, copy / file)
        for command in ("nbdev_clean", "nbdev_export"):
            subprocess.run([program(command)], cwd=copy, check=True)
        before = {
            p.relative_to(ROOT)
            for part in ("nbs", "oprd_nb")
            for p in (ROOT / part).rglob("*")
            if p.suffix in (".py", ".ipynb")
        }
        after = {
            p.relative_to(copy)
            for part in ("nbs", "oprd_nb")
            for p in (copy / part).rglob("*")
            if p.suffix in (".py", ".ipynb")
        }
        before = {p for p in before if ".ipynb_checkpoints" not in p.parts}
        return sorted(
            str(p) for p in before | after if p not in before & after or not is_same(ROOT / p, copy / p)
        )


if __name__ == "__main__":
    if files := differing():
        sys.exit(f"out of sync: {', '.join(files)}; edit the notebooks, then run nbdev_clean && nbdev_export")
    print("notebooks and package are in sync")
