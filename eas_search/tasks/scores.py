"""Scores of single samples, from 0 to 1, as functions of logits and labels."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
ARTICLES = ("a", "an", "the")
MINUS = "\u2212"  # the sign as typesetters write it
_NUMBER = re.compile(r"-?\.?\d")


def exact_match(logits: Tensor, labels: Tensor) -> Tensor:
    """Which samples are answered exactly: logits [B, n, V], labels [B, n] → bool [B].

    True where the argmax is right at every labelled position (logits at i predict token i + 1). This is
    teacher forcing, yet it equals the exact match of greedy decoding including EOS: as long as all tokens
    so far are right, the decoder sees the very prefix that teacher forcing shows; the first wrong token
    makes both comparisons fail. NaN logits count as wrong; a sample without labels is never a match.
    """
    wanted = labels[:, 1:]
    labelled = wanted != IGNORED
    shifted = logits[:, :-1]
    right = (shifted.argmax(dim=-1) == wanted) & ~shifted.isnan().any(dim=-1)
    return (right | ~labelled).all(dim=1) & labelled.any(dim=1)


def normalised(text: str) -> str:
    """A short answer without what does not matter: case, punctuation, articles, further spaces.

    A sign or a decimal point before a digit matters, and so does all that an answer has: the option "A" is no article.
    """
    return " ".join(_telling(text) or _words(text) or text.lower().split())


def _telling(text: str) -> list[str]:
    return [word for word in _words(text) if word not in ARTICLES]


def _words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation around them."""
    found = re.sub(r"[^\w\s.%°-]", " ", text.lower().replace(MINUS, "-")).split()
    found = [word.rstrip(".-") for word in found]
    return [word for word in (w if _NUMBER.match(w) else w.lstrip(".-") for w in found) if word]


def word_recall(said: str, right: str) -> float:
    """Share of the right answer's words that were said, each as often as it was; 1 where there are none to say.

    Articles and punctuation are no words.
    """
    wanted, given = Counter(_telling(right)), Counter(_telling(said))
    return (wanted & given).total() / wanted.total() if wanted else 1.0


def normalised_match(logits: Tensor, labels: Tensor, tokenizer: Any) -> Tensor:
    """Exact match of the *texts* after normalisation: logits [B, n, V], labels [B, n] → bool [B].

    Beside every exact match of tokens this accepts an answer whose most likely tokens, each given the right ones before
    it, spell the same text but for case, punctuation and articles.
    """
    exact = exact_match(logits, labels)
    shifted, wanted = logits[:, :-1], labels[:, 1:]
    best = shifted.argmax(dim=-1)
    usable = ~(shifted.isnan().any(dim=-1) & (wanted != IGNORED)).any(dim=1)
    for row in (~exact & usable & (wanted != IGNORED).any(dim=1)).nonzero().flatten().tolist():
        labelled = wanted[row] != IGNORED
        said, right = (tokenizer.decode(ids[row][labelled], skip_special_tokens=True) for ids in (best, wanted))
        # Where EOS is due, the answer must end: what comes before would otherwise match the beginning of a longer one.
        ends = bool(best[row][labelled][-1] == wanted[row][labelled][-1])
        exact[row] = ends and normalised(said) == normalised(right)
    return exact


def choice_match(logits: Tensor, position: Tensor, candidates: Tensor, answer: Tensor) -> Tensor:
    """Whether the right one of the candidate tokens is the most likely: logits [B, n, V] → bool [B].

    `position` [B] is where the chosen token stands in the input, `candidates` [B, C] are token ids (-1: none), `answer`
    [B] is the right one's column. NaN is wrong.
    """
    rows = torch.arange(len(logits), device=logits.device)
    at = logits[rows, position - 1]  # logits at i predict token i + 1
    values = at.gather(1, candidates.clamp(min=0)).masked_fill(candidates < 0, -math.inf)
    return (values.argmax(dim=1) == answer) & ~values.isnan().any(dim=1)


def class_match(logits: Tensor, labels: Tensor, possible: Tensor | None = None) -> Tensor:
    """Whether the largest of the class logits [B, C] is the label's [B] → bool [B].

    `possible` [B, C] says which classes a sample has; None: all of them. NaN is wrong.
    """
    values = logits if possible is None else logits.masked_fill(~possible, -math.inf)
    return (values.argmax(dim=-1) == labels) & ~values.isnan().any(dim=-1)


def class_worth(logits: Tensor, worth: Tensor) -> Tensor:
    """What the class with the largest logit is worth: logits and worth [B, C] → [B] double; 0 where a logit is NaN."""
    values = worth.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1).double()
    return values.masked_fill(logits.isnan().any(dim=1), 0.0)


def token_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """exp(−mean negative log-likelihood) of a sample's labelled tokens: logits [B, n, V], labels [B, n] → [B] double.

    This is the geometric mean of the tokens' probabilities, one over the sample's perplexity. NaN logits give 0.
    """
    wanted = labels[:, 1:]
    losses = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), wanted, ignore_index=IGNORED, reduction="none"
    ).double()
    return torch.exp(-losses.sum(dim=1) / (wanted != IGNORED).sum(dim=1)).nan_to_num(nan=0.0)
