"""The tool that changes the code: what it changes, what it leaves alone, and that a fork sees a change."""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from mutants import COLUMNS, TESTS, mutants_of, notices, store

SOURCE = """
__all__ = ["a", 1]
def area(width: Literal[3], height=2) -> Literal[4]:
    if width < 0 or not height:
        raise ValueError(f"width={width + 1}")
    warnings.warn("small" * 2)
    return width * height, grid[-1]
"""


def test_what_decides_is_changed_and_nothing_else():
    found = [mutant.code for mutant in mutants_of(SOURCE)]
    expected = ["3", "width <= 0", "width < 0 and (not height)", "1", "height", "width / height", "-2"]
    assert found == [f"({code})" for code in expected]


def test_every_mutant_is_a_program():
    data = SOURCE.encode()
    for mutant in mutants_of(SOURCE):
        compile(data[: mutant.start] + mutant.code.encode() + data[mutant.end :], "mutant", "exec")


def test_every_module_and_test_exists():
    root = Path(__file__).parents[1]
    for module, tests in TESTS.items():
        assert (root / "oprd_nb" / module).exists()
        assert all((root / "tests" / test).exists() for test in tests)


def test_a_fork_runs_the_changed_package(tmp_path):
    package = tmp_path / "unlikely_name"
    package.mkdir()
    test = tmp_path / "test_it.py"
    test.write_text("def test_it():\n    from unlikely_name import area\n    assert area == 6\n")
    results = []
    for area in (6, 7):
        (package / "__init__.py").write_text(f"area = {area}\n")
        results.append(notices(tmp_path, [str(test)], seconds=60))
    assert results == [False, True]


def test_a_module_run_again_replaces_its_line(tmp_path):
    path = tmp_path / "mutants.csv"
    line = dict.fromkeys(COLUMNS, 0)
    for module, tried in (("teachers.py", 3), ("capture.py", 5), ("teachers.py", 7)):
        store(line | {"module": module, "tried": tried}, path)
    table = pd.read_csv(path)
    assert table["module"].tolist() == ["capture.py", "teachers.py"]  # the order of TESTS
    assert table["tried"].tolist() == [5, 7]
    assert list(tmp_path.iterdir()) == [path]
