"""Explorers for notebooks: layers, ranks, rollouts, runs while they write"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "layers": ["LayerExplorer", "RankExplorer"],
        "rollouts": ["RolloutBrowser"],
        "dashboard": ["RunDashboard"],
    },
)

if TYPE_CHECKING:
    from .layers import LayerExplorer as LayerExplorer, RankExplorer as RankExplorer
    from .rollouts import RolloutBrowser as RolloutBrowser
    from .dashboard import RunDashboard as RunDashboard
