"""Word problems: solutions that are right, and splits that share no numbers."""

import random
import re

import pytest

from oprd_nb.tasks.grading import grade
from oprd_nb.tasks.words import KINDS, draw_problems, split_of_numbers, word_problems


@pytest.mark.parametrize("kind", KINDS)
def test_every_step_of_a_solution_is_true(kind):
    for seed in range(200):
        drawn = KINDS[kind](random.Random(seed))
        steps = re.findall(r"(\d+) ([-+*]) (\d+) = ?(\d*)", drawn.steps + f" {drawn.answer}")
        assert len(steps) == 2
        for left, operator, right, result in steps:
            operations = {
                "+": int(left) + int(right),
                "-": int(left) - int(right),
                "*": int(left) * int(right),
            }
            assert operations[operator] == int(result) > 0
        assert steps[0][3] == steps[1][0] or steps[0][3] == steps[1][2]


def test_splits_share_no_numbers_for_any_seed():
    found = {
        split: {
            (kind, problem.numbers) for seed in range(3) for kind, problem in draw_problems(500, split, seed)
        }
        for split in ("train", "validation", "test")
    }
    assert not found["train"] & found["test"]
    assert not found["train"] & found["validation"]
    assert not found["validation"] & found["test"]
    assert all(split_of_numbers(*one) == split for split, ones in found.items() for one in ones)


def test_a_task_is_the_same_for_a_seed_and_graded_right():
    task = word_problems(train=60, test=20, validation=20)
    assert task.train.to_list() == word_problems(train=60, test=20, validation=20).train.to_list()
    assert task.train.to_list() != word_problems(train=60, test=20, validation=20, seed=1).train.to_list()
    assert all(grade(row["solution"], row["answer"]) for row in task.train)
    assert [len(task.train), len(task.test), len(task.validation)] == [60, 20, 20]


@pytest.mark.parametrize("count", [0, -3, 10**6])
def test_counts_that_cannot_be_had_are_refused(count):
    with pytest.raises(ValueError, match=f"test={count}: give 1 to 100,000"):
        word_problems(test=count)
    with pytest.raises(ValueError, match="split='dev'"):
        draw_problems(3, "dev")
