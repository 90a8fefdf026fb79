"""Tiny models of the architectures in the installed `transformers`, with random weights in which every part shows."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

sys.path.insert(0, str(Path(__file__).parent))
from feeds import inputs
from overrides import CLASSES, OVERRIDES
from shrink import shrink

from eas_search.models.twin import fill

__all__ = ["build", "candidates", "inputs", "model_types"]

LARGEST = 8_000_000
TASKS = (
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "CAUSAL_LM",
    "SEQUENCE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "VIDEO_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "VISUAL_QUESTION_ANSWERING",
    "OBJECT_DETECTION",
    "DEPTH_ESTIMATION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "TIME_SERIES_PREDICTION",
)


@cache
def _classes() -> dict[str, tuple[str, ...]]:
    found: dict[str, list[str]] = {}
    for mapping in [f"MODEL_FOR_{task}_MAPPING_NAMES" for task in TASKS] + ["MODEL_MAPPING_NAMES"]:
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in (names,) if isinstance(names, str) else names:
                if name not in found.setdefault(model_type, []):
                    found[model_type].append(name)
    return {model_type: tuple(names) for model_type, names in found.items()}


def candidates(model_type: str) -> tuple[str, ...]:
    """Model classes for a model type, the one to test first; the first task of `TASKS` that it has."""
    return CLASSES.get(model_type, _classes().get(model_type, ()))


def model_types() -> list[str]:
    """Every model type of `transformers` that has a model class."""
    return sorted(name for name in CONFIG_MAPPING_NAMES if candidates(name))


def build(model_type: str, seed: int = 0) -> nn.Module:
    """A tiny model of the first candidate class, in eval mode and float32, with seeded random weights."""
    return build_class(model_type, candidates(model_type)[0], seed)


def build_class(model_type: str, name: str, seed: int = 0) -> nn.Module:
    """See `build`, for a given class."""
    with quiet():
        config = shrink(CONFIG_MAPPING[model_type](), OVERRIDES.get(model_type))
        _refuse_large(getattr(transformers, name), config)
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config).float()
        model.config.architectures = [name]  # as in every checkpoint
    return fill(model, seed)


def _refuse_large(kind: type[nn.Module], config: Any) -> None:
    """Parts that `shrink` does not know may keep their real size; they would cost minutes."""
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in kind(config).parameters())
    except Exception:  # some classes cannot be built without memory; the real construction decides
        return
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters although the configuration was made small")


class quiet:
    """No warnings and no log lines of `transformers` about invented configurations."""

    def __enter__(self) -> None:
        transformers.utils.logging.disable_progress_bar()
        self.level = logging.root.manager.disable
        logging.disable(logging.WARNING)
        self.caught = warnings.catch_warnings()
        self.caught.__enter__()
        warnings.simplefilter("ignore")

    def __exit__(self, *reason: Any) -> None:
        self.caught.__exit__(*reason)
        logging.disable(self.level)
