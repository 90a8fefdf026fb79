"""eas_search: find the attentions a pretrained transformer can do without, and export a model that is really faster.

Importing this package is light; torch, transformers and plotly are loaded when a name that needs them is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from eas_search.auto_classes import register

__version__ = "0.1.0"

_EXPORTS = {
    "AttentionSite": "eas_search.architectures",
    "BlockPattern": "eas_search.architectures",
    "attention_sites": "eas_search.architectures",
    "prove_sites": "eas_search.architectures",
    "refused_sites": "eas_search.architectures",
    "register_pattern": "eas_search.architectures",
    "prove_deletion": "eas_search.proof",
    "survey": "eas_search.site_survey",
    "SkipConfig": "eas_search.skip_config",
    "apply_skips": "eas_search.skipping",
    "merge": "eas_search.merging",
    "verify_merge": "eas_search.merging",
    "save_pretrained": "eas_search.export",
    "load_pretrained": "eas_search.export",
    "load_adapter": "eas_search.export",
    "verify": "eas_search.export",
    "plan_formats": "eas_search.export",
    "export_student": "eas_search.export",
    "ExportJob": "eas_search.export",
    "redundancy_scores": "eas_search.redundancy",
    "LatencyConfig": "eas_search.latency",
    "measure_latency": "eas_search.latency",
    "FineTuneConfig": "eas_search.training",
    "SearchSettings": "eas_search.settings",
    "create_study": "eas_search.study",
    "run_study": "eas_search.study",
    "pareto_front": "eas_search.study",
    "trials_frame": "eas_search.study",
    "Task": "eas_search.tasks",
    "register_task": "eas_search.tasks",
}

__all__ = sorted(_EXPORTS)  # noqa: PLE0605  (one table serves both)


def __getattr__(name: str) -> Any:
    """Import the module of a public name when the name is first used (PEP 562)."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'eas_search' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


register()  # with `transformers`, when that is imported
