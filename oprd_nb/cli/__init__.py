"""The command `oprd`"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "dispatch": ["main"],
    },
)

if TYPE_CHECKING:
    from .dispatch import main as main
