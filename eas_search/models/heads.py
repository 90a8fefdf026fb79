"""What a model ends in: labels of a classification head, and whether it must be trained anew."""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from typing import Any

from eas_search.exceptions import UnsupportedModelError
from eas_search.models.options import Head

log = logging.getLogger(__name__)

AUTO_CLASSES: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "visual-question-answering": "AutoModelForVisualQuestionAnswering",
}
# Heads that may be new.
CLASSIFIERS = (
    "sequence-classification",
    "multiple-choice",
    "image-classification",
    "visual-question-answering",
    "image-text-retrieval",
)
HEAD_SEED = 0


def set_labels(config: Any, labels: Sequence[str] | None) -> bool:
    """Write the labels into the configuration; returns whether the checkpoint's head was made for other ones."""
    if labels is None:
        return False
    before = list((config.id2label or {}).values())
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    return before != list(labels)


def new_head(
    model: Any, name: str, kind: Head, missing: Collection[str], other_labels: bool = False
) -> tuple[str, ...]:
    """Names of the head's parameters that must be trained; said in one line when there are any.

    A head is what lies outside the base model; a pooler, which belongs to it, may be missing too.

    Raises:
        UnsupportedModelError: other weights are missing.
    """
    keys = list(model.state_dict()) if kind in CLASSIFIERS else []
    head = {key for key in keys if key.split(".")[0] != model.base_model_prefix}
    poolers = {key for key in keys if "pooler" in key.split(".")}
    if body := sorted(set(missing) - head - poolers):
        raise UnsupportedModelError(
            f"model {name!r} lacks {len(body)} of the weights of {type(model).__name__}, e.g. {body[0]!r}; expected a "
            "complete checkpoint: download or save it again, or choose another model"
        )
    trained = {*missing, *(head if other_labels else ())}
    if trained:
        why = "is not in the checkpoint" if missing else "was made for other labels"
        log.warning("model %r: the head of %s %s; it is trained with the adapters", name, type(model).__name__, why)
    return tuple(sorted(trained & dict(model.named_parameters()).keys()))
