"""The models of this package that `transformers` lacks, for loaders that know a model by its `config.json`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Model type → package; importing it makes the Auto classes of `transformers` know the model.
PACKAGES = {"lavin": "eas_search.models.lavin", "meter": "eas_search.models.meter"}


def register_own(model_type: object) -> None:
    """Make `transformers` know the model type, if it is one of ours; others cost nothing."""
    if model_type in PACKAGES:
        import_module(PACKAGES[str(model_type)])


def register_for(location: str) -> None:
    """`register_own` for the model in a folder or behind a hub id."""
    from transformers.configuration_utils import PreTrainedConfig

    register_own(PreTrainedConfig.get_config_dict(location)[0].get("model_type"))


def own_class(model_type: object, architecture: object) -> Any:
    """Our class of this name, or None."""
    if model_type not in PACKAGES:
        return None
    return getattr(import_module(PACKAGES[str(model_type)]), str(architecture), None)
