"""What the fuzz tests share: seeded damage to files, and whether a command answers it in one line."""

import json
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from oprd_nb.cli import main

PATIENCE = 15
"""Seconds of processor time after which a command hangs."""

ASLEEP = 60
"""Seconds by the clock after which it hangs without computing: other tests may hold the processors."""

LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)
"""YAML whose aliases stand for a billion numbers."""

BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "empty": lambda data, rng: b"",
    "torn": lambda data, rng: data[: rng.randrange(1, max(2, len(data) - 1))],
    "last byte gone": lambda data, rng: data[:-1],
    "zeros": lambda data, rng: bytes(len(data)),
    "noise": lambda data, rng: rng.randbytes(min(len(data), 4000)),
    "noise inside": lambda data, rng: noise_inside(data, rng),
    "twice": lambda data, rng: data + data,
    "no text": lambda data, rng: b"\xff\xfe\x00" + data,
    "a picture": lambda data, rng: b"\x89PNG\r\n\x1a\n" + rng.randbytes(500),
}
"""Damage that any file can take."""

FOREIGN: list[object] = [
    None,
    True,
    -1,
    0,
    0.5,
    float("nan"),
    float("inf"),
    10**400,
    2**63,
    "",
    "text",
    "\ud800",
    "x" * 100_000,
    [],
    [1],
    ["a", None],
    [[[[[[]]]]]],
    {},
    {"a": 1},
    {"value": "text"},
]
"""Values of every kind, to put where another kind belongs."""


def noise_inside(data: bytes, rng: random.Random) -> bytes:
    """A few bytes in the middle of a file are others."""
    if not data:
        return data
    damaged = bytearray(data)
    at = rng.randrange(len(damaged))
    damaged[at : at + 16] = rng.randbytes(16)
    return bytes(damaged)


@dataclass
class Case:
    """One damaged file. `refused`: None where a command may read it all the same."""

    name: str
    file: str
    content: bytes | pd.DataFrame | None
    refused: bool | None = None

    def write(self, folder: Path) -> None:
        """Put the file in place of the good one; nothing where the content is None."""
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        if isinstance(self.content, pd.DataFrame):
            self.content.to_parquet(path)
        elif self.content is not None:
            path.write_bytes(self.content)


def damaged_bytes(file: str, data: bytes, rng: random.Random) -> Iterator[Case]:
    """Every kind of `BYTES`."""
    for name, damage in BYTES.items():
        yield Case(f"{file}: {name}", file, damage(data, rng))


def damaged_json(file: str, entries: dict, rng: random.Random, each: int = 4) -> Iterator[Case]:
    """Every entry with `each` values of another kind, and texts that JSON readers stumble over."""
    for key in entries:
        for value in rng.sample(FOREIGN, each):
            text = json.dumps(entries | {key: value})
            yield Case(f"{file}: {key} {str(value)[:20]!r}", file, text.encode("utf-8", "surrogatepass"))
    for name, text in {
        "a list": "[]",
        "a number": "7",
        "deep": '{"a":' * 100_000,
        "deep list": "[" * 100_000,
        "unclosed": '{"a": 1',
        "two": "{}{}",
        "bare": "nan",
    }.items():
        yield Case(f"{file}: {name}", file, text.encode(), refused=True)


def damaged_table(file: str, table: pd.DataFrame, rng: random.Random, each: int = 3) -> Iterator[Case]:
    """Every column left out, or with `each` kinds of other values."""
    count = len(table)
    others = {
        "texts": ["text"] * count,
        "lists": [[1, 2]] * count,
        "objects": [{"a": 1}] * count,
        "nothing": [None] * count,
        "dates": [pd.Timestamp("2020-01-01")] * count,
        "bytes": [b"\xff"] * count,
        "huge": [1e308] * count,
        "nan": [float("nan")] * count,
        "negative": [-5] * count,
        "one": [1] * count,
        "false": [False] * count,
    }
    for column in table.columns:
        yield Case(f"{file}: without {column}", file, table.drop(columns=column))
        for kind in rng.sample(sorted(others), each):
            content = table.assign(**{column: pd.Series(others[kind], table.index)})
            yield Case(f"{file}: {column} {kind}", file, content)
    yield Case(f"{file}: no rows", file, table.iloc[:0])
    yield Case(f"{file}: no columns", file, table[[]])


def check_none(wrong: list[tuple]) -> None:
    """Fails with one line per case that went wrong."""
    assert not wrong, "\n".join([f"{len(wrong)} cases", *map(str, wrong)])


def too_late(*_: object) -> None:
    raise TimeoutError(f"no answer in {PATIENCE} s of processor time, or {ASLEEP} s by the clock")


@contextmanager
def patience() -> Iterator[None]:
    """Raise TimeoutError in what hangs inside."""
    clocks = {signal.ITIMER_PROF: (signal.SIGPROF, PATIENCE), signal.ITIMER_REAL: (signal.SIGALRM, ASLEEP)}
    earlier = {name: signal.signal(name, too_late) for name, _ in clocks.values()}
    for clock, (_, seconds) in clocks.items():
        signal.setitimer(clock, seconds)
    try:
        yield
    finally:
        for clock in clocks:
            signal.setitimer(clock, 0)
        for name, handler in earlier.items():
            signal.signal(name, handler)


def flaw(argv: list[str], capsys, named: str = "", refused: bool | None = True) -> str | None:
    """What is wrong with a command's answer to a damaged input; None for one line with exit code 2.

    named: a part of the line. refused: None where the command may also accept the input.
    """
    with patience():
        code = main(argv)
    error = capsys.readouterr().err
    # A progress bar may stand in front of it, on the same line.
    lines = re.findall(rf"oprd {argv[0]}: .*", error)
    if code == 0:
        return "accepted" if refused else None
    if code != 2:
        return f"exit code {code}: {error[-300:]}"
    if "Traceback" in error or len(lines) != 1:
        return f"not one line: {error[-300:]}"
    (line,) = lines
    if named not in line:
        return f"does not name {named}: {line[:300]}"
    if not re.search(r"; [\w`]|between|[Cc]hoose|give|use|mend|write|copy", line):
        return f"names no way out: {line[:300]}"
    if len(line) > 700:
        return f"is {len(line)} characters long: {line[:300]}"
    return None


def reader_flaw(read: Callable[[], object], named: str, refused: bool | None = True) -> str | None:
    """What is wrong with how a function reads a damaged file; None for one line with `named`."""
    try:
        with patience():
            read()
    except ValueError as error:
        if isinstance(error, UnicodeError) or "\n" in str(error) or named not in str(error):
            return f"{type(error).__name__}: {str(error)[:300]}"
        return None
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return "accepted" if refused else None
