"""On-policy representation distillation: probe, understand, train, evaluate and see it"""

import logging
from typing import TYPE_CHECKING

import lazy_loader

__version__ = "0.1.0"

# Set before anything imports bitsandbytes, which reports a missing optional kernel at import.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# README's names, each imported when it is first asked for, so that `import oprd_nb` stays cheap.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "core": ["Layers", "Positions", "Rollouts", "set_seed"],
        "models": ["load_model", "load_tokenizer", "embedded"],
        "tasks": ["load_task", "grade"],
        "rollouts": ["HFSampler", "VLLMSampler"],
        "teachers": ["Teacher"],
        "bridge": ["Bridge", "ReadoutBridge"],
        "objectives": ["Representation", "SampledTokenKL", "TopKKL", "FullKL"],
        "evaluation": ["evaluate"],
        "training": ["OPRDConfig", "OPRDTrainer", "distil"],
    },
)

if TYPE_CHECKING:
    from .core import Layers as Layers, Positions as Positions, Rollouts as Rollouts, set_seed as set_seed
    from .models import load_model as load_model, load_tokenizer as load_tokenizer, embedded as embedded
    from .tasks import load_task as load_task, grade as grade
    from .rollouts import HFSampler as HFSampler, VLLMSampler as VLLMSampler
    from .teachers import Teacher as Teacher
    from .bridge import Bridge as Bridge, ReadoutBridge as ReadoutBridge
    from .objectives import Representation as Representation, SampledTokenKL as SampledTokenKL, TopKKL as TopKKL, FullKL as FullKL
    from .evaluation import evaluate as evaluate
    from .training import OPRDConfig as OPRDConfig, OPRDTrainer as OPRDTrainer, distil as distil
