"""Grade the cases in tests/cases with this kit and with math-verify alone; writes nbs/results/grading.json.

A case is a response, a reference answer and a mathematician's verdict. `python tools/grade_cases.py`
"""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

from math_verify import parse, verify

from oprd_nb.tasks.grading import grade

ROOT = Path(__file__).parent.parent
CASES = {"public reports": ROOT / "tests/cases/grading.csv", "kinds": ROOT / "tests/cases/grading_kinds.csv"}
RESULT = ROOT / "nbs/results/grading.json"


def read_cases(path: Path) -> list[dict[str, str]]:
    """The rows of a file of cases."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def math_verify_alone(response: str, answer: str) -> bool:
    """What math-verify says with its own settings, of the whole response."""
    try:
        return bool(verify(parse(f"\\boxed{{{answer}}}"), parse(response)))
    except Exception:
        return False


def counted(cases: list[dict[str, str]], judge: Callable[[str, str], bool]) -> dict[str, float]:
    """How many cases are judged as the mathematician did, and how many wrong answers are called right."""
    judged = [judge(case["response"], case["answer"]) for case in cases]
    expected = [case["right"] == "True" for case in cases]
    pairs = list(zip(judged, expected, strict=True))
    return {
        "cases": len(cases),
        "agree": sum(says == right for says, right in pairs),
        "false_positives": sum(says and not right for says, right in pairs),
        "false_negatives": sum(right and not says for says, right in pairs),
    }


def main() -> None:
    """Write the table."""
    logging.disable(logging.CRITICAL)
    judges = {"this kit": grade, "math-verify alone": math_verify_alone}
    table = [
        {"set": name, "grader": judge_name} | counted(read_cases(path), judge)
        for name, path in CASES.items()
        for judge_name, judge in judges.items()
    ]
    RESULT.write_text(json.dumps(table, indent=1) + "\n")
    for row in table:
        print(row)


if __name__ == "__main__":
    main()
