"""Where do two models agree, and what can be read off their hidden states?"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "states": ["PairedStates", "paired_states", "collect", "moments_and_heldout"],
        "similarity": ["position_cosines", "cosine_by_layer", "cka", "cka_matrix", "mutual_knn"],
        "linear": ["linear_probe"],
    },
)

if TYPE_CHECKING:
    from .states import (
        PairedStates as PairedStates,
        collect as collect,
        moments_and_heldout as moments_and_heldout,
        paired_states as paired_states,
    )
    from .similarity import (
        position_cosines as position_cosines,
        cosine_by_layer as cosine_by_layer,
        cka as cka,
        cka_matrix as cka_matrix,
        mutual_knn as mutual_knn,
    )
    from .linear import linear_probe as linear_probe
