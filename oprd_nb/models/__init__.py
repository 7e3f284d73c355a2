"""Students and teachers: loading, the embedded pairs, memory, placement"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "loading": ["load_model", "load_tokenizer", "end_tokens", "input_device"],
        "pairs": ["ModelPair", "embedded"],
        "memory": ["MemoryConfig", "memory_of"],
        "placement": ["placement_line"],
    },
)

if TYPE_CHECKING:
    from .loading import (
        end_tokens as end_tokens,
        input_device as input_device,
        load_model as load_model,
        load_tokenizer as load_tokenizer,
    )
    from .pairs import ModelPair as ModelPair, embedded as embedded
    from .memory import MemoryConfig as MemoryConfig, memory_of as memory_of
    from .placement import placement_line as placement_line
