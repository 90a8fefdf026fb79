"""Texts and pairs of texts as tensors, for encoders and classifiers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eas_search.exceptions import TaskDataError

if TYPE_CHECKING:
    from torch import Tensor

UNLIMITED = 100_000  # tokenizers that know no limit name an astronomical one


def encode_texts(
    processor: Any, pairs: Sequence[tuple[str, str | None]], max_length: int | None = None
) -> dict[str, Tensor]:
    """Token tensors [N, n] of texts or pairs of texts, padded on the right.

    Longer ones are cut at `max_length`, by default at what the tokenizer says the model can read.

    Raises:
        TaskDataError: the tokenizer cannot pad.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(tokenizer, "pad_token_id", None) is None:
        raise TaskDataError(
            f"tokenizer '{type(tokenizer).__name__}' has no padding token; expected one, because texts differ in "
            "length; set pad_token in the model's tokenizer_config.json."
        )
    limit = readable(tokenizer) if max_length is None else max_length
    second = None if pairs[0][1] is None else [pair or "" for _, pair in pairs]
    encoded = tokenizer(
        [text for text, _ in pairs],
        second,
        padding=True,
        padding_side="right",
        truncation=limit is not None,
        max_length=limit,
        return_tensors="pt",
    )
    return dict(encoded)


def prompt_options(tokenizer: Any, prompt: str) -> dict[str, bool]:
    """What a tokenizer or processor is told beside a prompt: to add no special tokens where it begins with its BOS.

    Chat templates write BOS themselves, and a model has never seen two. `transformers` decides the same way when it
    tokenizes what a template made (`ProcessorMixin.apply_chat_template`).
    """
    begin = getattr(tokenizer, "bos_token", None)
    return {"add_special_tokens": False} if begin and prompt.startswith(begin) else {}


def readable(tokenizer: Any) -> int | None:
    """How many tokens the model can read, as the tokenizer knows it; None when it knows no limit."""
    limit = getattr(tokenizer, "model_max_length", UNLIMITED)
    return int(limit) if limit < UNLIMITED else None
