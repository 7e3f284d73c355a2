"""Avg@k and its relatives, with intervals"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "metrics": ["avg_at_k", "best_at_k", "maj_at_k", "distinct_n"],
        "sampling": ["Evaluation", "evaluate"],
        "comparison": ["compare", "paired_table"],
    },
)

if TYPE_CHECKING:
    from .metrics import (
        avg_at_k as avg_at_k,
        best_at_k as best_at_k,
        maj_at_k as maj_at_k,
        distinct_n as distinct_n,
    )
    from .sampling import Evaluation as Evaluation, evaluate as evaluate
    from .comparison import compare as compare, paired_table as paired_table
