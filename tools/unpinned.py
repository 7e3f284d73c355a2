"""Print what the package and its tests need, without versions, and nbdev 3 in place of nbdev 2.

For `make test-newest`: every requirement of settings.ini as the package index has it today.
"""

import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parent.parent
NBDEV_2 = {"nbdev", "fastcore", "execnb", "ghapi"}
"""nbdev 2 and the last releases of the packages that it works with."""


def unpinned() -> list[str]:
    """Names of the packages, nbdev 3 last."""
    ini = ConfigParser(delimiters=["="])
    ini.read(ROOT / "settings.ini")
    listed = ini["DEFAULT"]["requirements"].split() + ini["DEFAULT"]["dev_requirements"].split()
    names = [re.split(r"[<>=!~]", requirement)[0] for requirement in listed]
    return [name for name in names if name not in NBDEV_2] + ["nbdev>=3"]


if __name__ == "__main__":
    print("\n".join(unpinned()))
