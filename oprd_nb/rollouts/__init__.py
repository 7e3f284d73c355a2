"""The student writes: prompts, samplers"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "prompts": ["PromptFormat", "encode_prompts"],
        "settings": ["SamplingSettings"],
        "samplers": ["Sampler", "HFSampler", "ReplaySampler", "logprob_gap", "response_log_probs"],
        "turns": ["ToolSampler"],
        "vllm": ["VLLMSampler"],
        "mixed": ["MixedSampler"],
    },
)

if TYPE_CHECKING:
    from .mixed import MixedSampler as MixedSampler
    from .prompts import PromptFormat as PromptFormat, encode_prompts as encode_prompts
    from .samplers import (
        Sampler as Sampler,
        HFSampler as HFSampler,
        ReplaySampler as ReplaySampler,
        logprob_gap as logprob_gap,
        response_log_probs as response_log_probs,
    )
    from .settings import SamplingSettings as SamplingSettings
    from .turns import ToolSampler as ToolSampler
    from .vllm import VLLMSampler as VLLMSampler
