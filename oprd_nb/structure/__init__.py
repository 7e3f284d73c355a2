"""Low-rank structure of hidden states across two models"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "moments": ["Moments", "PairMoments", "effective_rank", "pca_spectrum"],
        "ridge": ["fit_ridge", "fit_all"],
        "ranks": [
            "rank_curve",
            "suggest_rank",
            "component_r2",
            "error_decomposition",
        ],
    },
)

if TYPE_CHECKING:
    from .moments import (
        Moments as Moments,
        PairMoments as PairMoments,
        effective_rank as effective_rank,
        pca_spectrum as pca_spectrum,
    )
    from .ridge import fit_all as fit_all, fit_ridge as fit_ridge
    from .ranks import (
        rank_curve as rank_curve,
        suggest_rank as suggest_rank,
        component_r2 as component_r2,
        error_decomposition as error_decomposition,
    )
