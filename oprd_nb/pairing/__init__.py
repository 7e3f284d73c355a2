"""Which teacher layer and which teacher position is paired with which of the student's"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "layers": ["pair_layers"],
        "token_bytes": ["fingerprint", "vocabulary_bytes"],
        "positions": ["Pairs", "pair_positions"],
    },
)

if TYPE_CHECKING:
    from .layers import pair_layers as pair_layers
    from .token_bytes import fingerprint as fingerprint, vocabulary_bytes as vocabulary_bytes
    from .positions import Pairs as Pairs, pair_positions as pair_positions
