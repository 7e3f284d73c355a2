"""What losses, bridges and samplers cost"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "methods": ["BACKBONES", "LABELS", "OURS", "PAPER", "SMOLLM2", "TINY", "Shape", "methods_for"],
        "measure": [
            "AXES",
            "bench_bridge",
            "bench_growth",
            "bench_loss_path",
            "bench_on_device",
            "bench_peaks",
            "bench_ragged",
            "bench_sampler",
            "beyond_backbones",
            "summary",
            "target_bytes",
        ],
        "gpu": ["gradient_parity", "load_gpu_check", "outcomes", "stored_gpu_checks", "train_random"],
        "trainers": ["SMOLLM2_TRAINING", "TINY_TRAINING", "TRAINERS", "TrainingShape"],
        "batching": ["WAYS", "bench_batching"],
        "whole_steps": ["bench_trainers", "trainers_summary"],
        "results": ["cost_figure", "growth_figure", "load_bench", "save_bench"],
    },
)

if TYPE_CHECKING:
    from .batching import WAYS as WAYS, bench_batching as bench_batching
    from .gpu import (
        gradient_parity as gradient_parity,
        load_gpu_check as load_gpu_check,
        outcomes as outcomes,
        stored_gpu_checks as stored_gpu_checks,
        train_random as train_random,
    )
    from .measure import (
        AXES as AXES,
        bench_bridge as bench_bridge,
        bench_growth as bench_growth,
        bench_loss_path as bench_loss_path,
        bench_on_device as bench_on_device,
        bench_peaks as bench_peaks,
        bench_ragged as bench_ragged,
        bench_sampler as bench_sampler,
        beyond_backbones as beyond_backbones,
        summary as summary,
        target_bytes as target_bytes,
    )
    from .methods import (
        BACKBONES as BACKBONES,
        LABELS as LABELS,
        OURS as OURS,
        PAPER as PAPER,
        SMOLLM2 as SMOLLM2,
        TINY as TINY,
        Shape as Shape,
        methods_for as methods_for,
    )
    from .results import (
        cost_figure as cost_figure,
        growth_figure as growth_figure,
        load_bench as load_bench,
        save_bench as save_bench,
    )
    from .trainers import (
        SMOLLM2_TRAINING as SMOLLM2_TRAINING,
        TINY_TRAINING as TINY_TRAINING,
        TRAINERS as TRAINERS,
        TrainingShape as TrainingShape,
    )
    from .whole_steps import (
        bench_trainers as bench_trainers,
        trainers_summary as trainers_summary,
    )
