"""The losses: hidden states, sampled tokens, top-k and full distributions, freely added"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "distances": ["DISTANCES"],
        "terms": ["Term", "TermInputs", "Objective"],
        "representation": ["Representation"],
        "output_space": ["SampledTokenKL", "TopKKL", "FullKL", "CrossEntropy"],
        "reward": ["TaskReward"],
        "heads": ["calibrate_head"],
        "followups": ["CrossFade", "Farthest", "Transitions", "Relational", "Weighted", "TopKTailKL"],
        "objective": [
            "TermLosses",
            "position_losses",
            "reduce_losses",
            "loss_of",
            "loss_on_pairs",
            "score_responses",
        ],
    },
)

if TYPE_CHECKING:
    from .distances import DISTANCES as DISTANCES
    from .terms import Term as Term, TermInputs as TermInputs, Objective as Objective
    from .representation import Representation as Representation
    from .output_space import (
        CrossEntropy as CrossEntropy,
        FullKL as FullKL,
        SampledTokenKL as SampledTokenKL,
        TopKKL as TopKKL,
    )
    from .reward import TaskReward as TaskReward
    from .heads import calibrate_head as calibrate_head
    from .followups import (
        CrossFade as CrossFade,
        Farthest as Farthest,
        Relational as Relational,
        TopKTailKL as TopKTailKL,
        Transitions as Transitions,
        Weighted as Weighted,
    )
    from .objective import (
        TermLosses as TermLosses,
        loss_of as loss_of,
        loss_on_pairs as loss_on_pairs,
        position_losses as position_losses,
        reduce_losses as reduce_losses,
        score_responses as score_responses,
    )
