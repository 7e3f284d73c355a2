"""Frozen maps between the hidden states of two models"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "base": ["BridgeBase"],
        "pca": ["Bridge", "fit_bridge"],
        "readout": ["KLTargets", "ReadoutBridge", "TokenTargets", "fit_readout", "load_bridge"],
    },
)

if TYPE_CHECKING:
    from .base import BridgeBase as BridgeBase
    from .pca import Bridge as Bridge, fit_bridge as fit_bridge
    from .readout import (
        KLTargets as KLTargets,
        ReadoutBridge as ReadoutBridge,
        TokenTargets as TokenTargets,
        fit_readout as fit_readout,
        load_bridge as load_bridge,
    )
