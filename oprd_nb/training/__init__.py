"""On-policy training on TRL's DistillationTrainer"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["OPRDConfig"],
        "trainer": ["OPRDTrainer"],
        "experiment": ["distil"],
        "export": ["export_model"],
        "checkpoints": ["last_good_checkpoint"],
    },
)

if TYPE_CHECKING:
    from .config import OPRDConfig as OPRDConfig
    from .trainer import OPRDTrainer as OPRDTrainer
    from .experiment import distil as distil
    from .export import export_model as export_model
    from .checkpoints import last_good_checkpoint as last_good_checkpoint
