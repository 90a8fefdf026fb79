"""Metrics: how a model's answers become one score per sample, from 0 to 1, higher is better, and a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eas_search.models.calling import without_cache
from eas_search.tasks.prompts import left_prompts
from eas_search.tasks.scores import (
    IGNORED,
    choice_match,
    class_match,
    class_worth,
    exact_match,
    normalised,
    normalised_match,
    token_likelihood,
)

Batch = Mapping[str, Tensor]
MOST_GROUPS = 24  # a breakdown with more rows would say nothing at a glance


class Scored(Protocol):
    """What a report is made from: an encoded split."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """See `EncodedSplit`."""

    @property
    def groups(self) -> tuple[str, ...]:
        """See `EncodedSplit`."""


def by_group(split: Scored, scores: Tensor) -> dict[str, float]:
    """Mean score of every group, where there are several; for too many groups nothing."""
    names = sorted(set(split.groups))
    if not 1 < len(names) <= MOST_GROUPS:
        return {}
    return {name: mean_where(scores, [group == name for group in split.groups]) for name in names}


def mean_where(scores: Tensor, chosen: list[bool]) -> float:
    """Mean of the chosen scores; NaN when none is."""
    return scores.double()[torch.tensor(chosen)].mean().item()


@dataclass(frozen=True)
class Scoring:
    """A metric.

    Attributes:
        metric: its name in tables.
        score: from (model, inputs of the model, extras of the batch) to the samples' scores [B]: bool for right or
            wrong, else floating point from 0 to 1.
        report: further figures by name, from all samples and their scores [N].
        answers_follow: whether the labelled tokens are an answer that follows the prompt, so that prompts end there.
        labelled: whether it looks at no logits but those that predict a label, so that others need not be computed.
    """

    metric: str
    score: Callable[[nn.Module, Batch, Batch], Tensor]
    report: Callable[[Scored, Tensor], dict[str, float]] = by_group
    answers_follow: bool = False
    labelled: bool = False


def logits_of(model: nn.Module, inputs: Batch) -> Tensor:
    """The model's logits, computed without a KV cache."""
    logits: Tensor = model(**inputs, **without_cache(model)).logits
    return logits


def perplexity(split: Scored, scores: Tensor) -> dict[str, float]:
    """Perplexity of all labelled tokens together, from the samples' `token_likelihood`."""
    counts = (split.tensors["labels"][:, 1:] != IGNORED).sum(dim=1).double()
    # A likelihood of 0 has underflowed; the smallest double keeps the figure finite.
    losses = -scores.double().clamp(min=torch.finfo(torch.float64).tiny).log()
    return {"perplexity": math.exp(min(700.0, float((losses * counts).sum() / counts.sum())))}


EXACT_MATCH = Scoring(
    "exact match",
    lambda model, inputs, extras: exact_match(logits_of(model, inputs), inputs["labels"]),
    answers_follow=True,
    labelled=True,
)
CLASS_MATCH = Scoring(
    "accuracy",
    lambda model, inputs, extras: class_match(logits_of(model, inputs), inputs["labels"], extras.get("possible")),
)
CLASS_WORTH = Scoring(
    "VQA accuracy",
    lambda model, inputs, extras: class_worth(logits_of(model, inputs), inputs["labels"]),
)
TOKEN_LIKELIHOOD = Scoring(
    "token likelihood",
    lambda model, inputs, extras: token_likelihood(logits_of(model, inputs), inputs["labels"]),
    perplexity,
    labelled=True,
)


def choice_or_text(
    metric: str, tokenizer: Any, report: Callable[[Scored, Tensor], dict[str, float]] = by_group
) -> Scoring:
    """Choice among the listed letters where a sample has them (extras of `choices.choice_tensors`), else the text."""

    def score(model: nn.Module, inputs: Batch, extras: Batch) -> Tensor:
        logits = logits_of(model, inputs)
        text = normalised_match(logits, inputs["labels"], tokenizer)
        position = extras["position"]
        chosen = choice_match(logits, position.clamp(min=1), extras["candidates"], extras["choice"])
        return torch.where(position > 0, chosen, text)

    return Scoring(metric, score, report, answers_follow=True, labelled=True)


def generated(
    metric: str,
    tokenizer: Any,
    tensors: Batch,
    report: Callable[[Scored, Tensor], dict[str, float]] = by_group,
    judge: Callable[[str, str], bool] = lambda said, right: normalised(said) == normalised(right),
) -> Scoring:
    """Greedy generation of at most as many tokens as the longest answer in `tensors` has.

    `judge` says whether a generated text is right, given the right answer's text.
    """
    longest = longest_answer(tensors)

    def score(model: Any, inputs: Batch, extras: Batch) -> Tensor:
        return torch.tensor([judge(*texts) for texts in generated_texts(model, inputs, tokenizer, longest)])

    return Scoring(metric, score, report, answers_follow=True)


def longest_answer(tensors: Batch) -> int:
    """Labelled tokens of the sample that has most of them."""
    return int((tensors["labels"] != IGNORED).sum(dim=1).max())


def generated_texts(model: Any, inputs: Batch, tokenizer: Any, longest: int) -> list[tuple[str, str]]:
    """(what the model answers by greedy generation, the right answer) of every sample."""
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    prompts = left_prompts(dict(inputs), padding)
    made = model.generate(**prompts, max_new_tokens=longest, do_sample=False, pad_token_id=padding)
    said = [tokenizer.decode(ids, skip_special_tokens=True) for ids in made[:, prompts["input_ids"].shape[1] :]]
    right = [tokenizer.decode(ids[ids != IGNORED], skip_special_tokens=True) for ids in inputs["labels"]]
    return list(zip(said, right, strict=True))


def forced_texts(model: nn.Module, inputs: Batch, tokenizer: Any) -> list[tuple[str, str]]:
    """(the most likely tokens, each given the right ones before it; the right answer) of every sample.

    Where a logit is NaN nothing was said. What stands in the place of EOS belongs to the answer.
    """
    logits, wanted = logits_of(model, inputs)[:, :-1], inputs["labels"][:, 1:]
    texts = []
    for best, bad, labels in zip(logits.argmax(dim=-1), logits.isnan().any(dim=-1), wanted, strict=True):
        at = labels != IGNORED
        said = "" if bool((bad & at).any()) else tokenizer.decode(best[at], skip_special_tokens=True)
        texts.append((said, tokenizer.decode(labels[at], skip_special_tokens=True)))
    return texts


def likeliest(metric: str) -> Scoring:
    """Whether the right choice has the largest summed log-likelihood, given its prompt.

    The extras hold `choice_ids` and `choice_labels` [B, C, n] and `choice` [B]; a choice without labels does not exist.
    """

    def score(model: nn.Module, inputs: Batch, extras: Batch) -> Tensor:
        sums = []
        for ids, labels in zip(extras["choice_ids"].unbind(1), extras["choice_labels"].unbind(1), strict=True):
            # Padding follows on the right, where a decoder never looks; the labels tell it where the prompt ends.
            logits = logits_of(model, {"input_ids": ids, "labels": labels})[:, :-1].float()
            wanted = labels[:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none")
            sums.append(torch.where((wanted != IGNORED).any(dim=1), -losses.sum(dim=1), -math.inf))
        total = torch.stack(sums, dim=1)
        return (total.argmax(dim=1) == extras["choice"]) & ~total.isnan().any(dim=1)

    return Scoring(metric, score, answers_follow=True, labelled=True)
