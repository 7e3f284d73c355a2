"""Problem sets and the grading of answers"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "problems": ["Task", "arithmetic", "contamination"],
        "loading": ["load_task"],
        "answers": ["extract_answer", "answer_kind", "count_answers"],
        "grading": ["grade", "grade_all", "grader", "same_answer"],
        "words": ["word_problems"],
    },
)

if TYPE_CHECKING:
    from .problems import (
        Task as Task,
        arithmetic as arithmetic,
        contamination as contamination,
    )
    from .answers import (
        extract_answer as extract_answer,
        answer_kind as answer_kind,
        count_answers as count_answers,
    )
    from .grading import (
        grade as grade,
        grade_all as grade_all,
        grader as grader,
        same_answer as same_answer,
    )
    from .loading import load_task as load_task
    from .words import word_problems as word_problems
