"""Every figure and table, from run folders"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "theme": ["base_figure"],
        "curves": [
            "accuracy_curve",
            "length_curve",
            "cosine_curve",
            "layer_cosine",
            "layer_heatmap",
            "pg_loss_curve",
            "overlap_curve",
            "entropy_curves",
            "snr_curve",
            "gradient_curve",
        ],
        "outcomes": ["pareto_bubble", "mu_sweep", "position_cosine", "rank_cosine"],
        "evaluations": ["plot_evaluations"],
        "paper": ["paper_table"],
        "tables": [
            "accuracy_table",
            "cost_table",
            "cross_architecture_table",
            "cross_tokenizer_table",
            "diversity_table",
        ],
        "sweeps": ["sweep_figure", "final_figure"],
        "report": ["write_report"],
    },
)

if TYPE_CHECKING:
    from .theme import base_figure as base_figure
    from .curves import (
        accuracy_curve as accuracy_curve,
        length_curve as length_curve,
        cosine_curve as cosine_curve,
        layer_cosine as layer_cosine,
        layer_heatmap as layer_heatmap,
        pg_loss_curve as pg_loss_curve,
        overlap_curve as overlap_curve,
        entropy_curves as entropy_curves,
        snr_curve as snr_curve,
        gradient_curve as gradient_curve,
    )
    from .outcomes import (
        pareto_bubble as pareto_bubble,
        mu_sweep as mu_sweep,
        position_cosine as position_cosine,
        rank_cosine as rank_cosine,
    )
    from .evaluations import plot_evaluations as plot_evaluations
    from .paper import paper_table as paper_table
    from .tables import (
        accuracy_table as accuracy_table,
        cost_table as cost_table,
        cross_architecture_table as cross_architecture_table,
        cross_tokenizer_table as cross_tokenizer_table,
        diversity_table as diversity_table,
    )
    from .sweeps import sweep_figure as sweep_figure, final_figure as final_figure
    from .report import write_report as write_report
