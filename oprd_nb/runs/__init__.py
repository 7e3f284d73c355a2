"""The folder a run leaves: written, read, and put into tables"""

from typing import TYPE_CHECKING

import lazy_loader

# A name is imported from its module when it is first asked for: importing one module of this folder
# does not import the dependencies of the others.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "folder": [
            "METHODS",
            "METRICS",
            "Evals",
            "Method",
            "Metric",
            "Run",
            "RunPaths",
            "merge_line",
            "method_style",
            "metric_of",
            "parse_line",
            "read_metrics",
            "read_run",
            "read_settings",
            "rows_table",
            "summary_value",
            "write_about",
            "write_settings",
        ],
        "synthetic": ["synthetic_metrics", "synthetic_run"],
        "tables": [
            "Runs",
            "accuracy_metric",
            "add_to_summary",
            "as_runs",
            "layer_table",
            "metrics_table",
            "mu_table",
            "peak_memory",
            "problem_scores",
            "ran_on_cpu",
            "require_columns",
            "set_scores",
            "summary_entries",
            "summary_table",
            "teacher_accuracy",
        ],
    },
)

if TYPE_CHECKING:
    from .folder import METHODS as METHODS, METRICS as METRICS, Evals as Evals, Method as Method
    from .folder import Metric as Metric, Run as Run, RunPaths as RunPaths, merge_line as merge_line
    from .folder import method_style as method_style, metric_of as metric_of, parse_line as parse_line
    from .folder import read_metrics as read_metrics, read_run as read_run, read_settings as read_settings
    from .folder import rows_table as rows_table, summary_value as summary_value
    from .folder import write_about as write_about, write_settings as write_settings
    from .synthetic import synthetic_metrics as synthetic_metrics, synthetic_run as synthetic_run
    from .tables import Runs as Runs, accuracy_metric as accuracy_metric, as_runs as as_runs
    from .tables import layer_table as layer_table, metrics_table as metrics_table, mu_table as mu_table
    from .tables import peak_memory as peak_memory, problem_scores as problem_scores
    from .tables import ran_on_cpu as ran_on_cpu, require_columns as require_columns
    from .tables import set_scores as set_scores, summary_table as summary_table
    from .tables import add_to_summary as add_to_summary, summary_entries as summary_entries
    from .tables import teacher_accuracy as teacher_accuracy
