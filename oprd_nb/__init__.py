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
        "several": ["Teachers", "TeacherMix"],
        "cached": ["CachedTeacher", "write_cache"],
        "privileged": ["PrivilegedTeacher", "ToldPrompt"],
        "served": ["ServedTeacher"],
        "bridge": ["Bridge", "ReadoutBridge"],
        "objectives": ["Representation", "SampledTokenKL", "TopKKL", "FullKL"],
        "evaluation": ["evaluate"],
        "training": ["OPRDConfig", "OPRDTrainer", "distil"],
    },
)

if TYPE_CHECKING:
    from .bridge import Bridge as Bridge
    from .bridge import ReadoutBridge as ReadoutBridge
    from .cached import CachedTeacher as CachedTeacher
    from .cached import write_cache as write_cache
    from .core import Layers as Layers
    from .core import Positions as Positions
    from .core import Rollouts as Rollouts
    from .core import set_seed as set_seed
    from .evaluation import evaluate as evaluate
    from .models import embedded as embedded
    from .models import load_model as load_model
    from .models import load_tokenizer as load_tokenizer
    from .objectives import FullKL as FullKL
    from .objectives import Representation as Representation
    from .objectives import SampledTokenKL as SampledTokenKL
    from .objectives import TopKKL as TopKKL
    from .privileged import PrivilegedTeacher as PrivilegedTeacher
    from .privileged import ToldPrompt as ToldPrompt
    from .rollouts import HFSampler as HFSampler
    from .rollouts import VLLMSampler as VLLMSampler
    from .served import ServedTeacher as ServedTeacher
    from .several import TeacherMix as TeacherMix
    from .several import Teachers as Teachers
    from .tasks import grade as grade
    from .tasks import load_task as load_task
    from .teachers import Teacher as Teacher
    from .training import OPRDConfig as OPRDConfig
    from .training import OPRDTrainer as OPRDTrainer
    from .training import distil as distil
