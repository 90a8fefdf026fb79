"""`--show-batch`: the first training batch as the model gets it, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from eas_search.models.loading import load_processor, model_location
from eas_search.settings import SearchSettings
from eas_search.skip_config import Pooling
from eas_search.tasks import Task, get_task
from eas_search.tasks.scores import IGNORED
from eas_search.training import endless


def describe_first_batch(settings: SearchSettings) -> Iterator[str]:
    """Lines on the batch of the first training step: prompts, labels, and which tokens may enter a pooled mean.

    Raises:
        EasSearchError: whatever is wrong with the task, its data or the model's processor.
    """
    task = get_task(settings.task, settings.data, settings.task_options)
    processor = load_processor(model_location(settings.model), settings.loading.trust_remote_code)
    split = task.encode(processor, task.examples("train", settings.samples.train))
    generator = torch.Generator().manual_seed(settings.seed)  # as the baseline's fine-tune draws its batches
    batch = next(iter(endless(split, settings.baseline.batch_size, generator)))
    pooling = settings.student.pooling or task.pooling
    decoders = " (in a decoder: none)" if settings.student.pooling is None and pooling == "all" else ""
    yield (
        f"Task {task.name}: {len(split)} training samples, score: {split.scoring.metric}, head: {task.head}, "
        f"pooling: {pooling}{decoders}"
    )
    yield from task.notes
    yield "First batch: " + ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in batch.items())
    for row in range(len(batch["labels"])):
        yield ""
        yield from _describe(task, processor, {name: tensor[row] for name, tensor in _row_wise(batch).items()}, pooling)


def _row_wise(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a row per sample; those of images may have fewer where only some samples have one."""
    return {name: tensor for name, tensor in batch.items() if len(tensor) == len(batch["labels"])}


def _describe(task: Task, processor: Any, sample: Mapping[str, Tensor], pooling: Pooling) -> Iterator[str]:
    labels = sample["labels"]
    if labels.dim() == 0:
        names = task.labels
        yield f"label:  {int(labels)}" + ("" if names is None else f" ({names[int(labels)]})")
    if "input_ids" not in sample:
        yield "pooled: all patches of the image"
        return
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = sample["input_ids"].reshape(-1, sample["input_ids"].shape[-1])
    masks = sample["attention_mask"].reshape(texts.shape).bool()
    for ids, mask in zip(texts, masks, strict=True):
        labelled = labels != IGNORED if labels.dim() == 1 else torch.zeros_like(mask)
        if pooling != "prefix":
            yield f"prompt: {_text(tokenizer, ids[mask & ~labelled])}"
        if labelled.any():
            yield f"labels: {_text(tokenizer, ids[labelled])}"
        if pooling == "none":
            continue
        pooled = mask & (labelled.cumsum(dim=0) == 0) if pooling == "prompt" else mask
        what = "each token sees those up to itself" if pooling == "prefix" else _text(tokenizer, ids[pooled])
        yield f"pooled: {int(pooled.sum())} of {int(mask.sum())} tokens: {what}"


def _text(tokenizer: Any, ids: Tensor) -> str:
    """Tokens as text; one that stands many times in a row (an image's) is counted instead."""
    pieces, plain = [], list[int]()
    for token, run in groupby(ids.tolist()):
        count = len(list(run))
        if count < 4:
            plain += [token] * count
            continue
        pieces += [repr(tokenizer.decode(plain))] if plain else []
        pieces.append(f"{count} × {tokenizer.convert_ids_to_tokens(token)}")
        plain = []
    return " ".join([*pieces, *([repr(tokenizer.decode(plain))] if plain else [])]) or "none"
