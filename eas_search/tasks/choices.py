"""Answers that name an option: "B", "(B)", "The answer is B." and the tokens among which a model chooses them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from eas_search.tasks.answers import answer_ids
from eas_search.tasks.base import Example

if TYPE_CHECKING:
    from torch import Tensor

_OPTION = re.compile(r"(?:^|[\s(])([A-Z])[.)](?=\s)")
_STATED = re.compile(r"\banswer is\s*:?\s*\(?([A-Z])\b")
_ALONE = re.compile(r"^\(?([A-Z])(?:[).:]|\s*$)")


def option_letter(text: str) -> str | None:
    """The option that an answer names: "B", "(B)", "B. a dog" or "… the answer is B." → "B"; None if it names none."""
    found = _STATED.search(text) or _ALONE.match(text.strip())
    return found[1] if found else None


def option_count(prompt: str) -> int:
    """How many options a prompt lists as "A. …" or "(A) …", counted from A without a gap."""
    letters = set(_OPTION.findall(prompt))
    count = 0
    while chr(ord("A") + count) in letters:
        count += 1
    return count


def choice_tensors(
    tokenizer: Any, examples: Sequence[Example], texts: Sequence[str], tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Where and among which tokens a sample chooses an option letter, for `scores.choice_match`.

    Returns:
        `position` [N] of the letter in the input (0: the sample chooses no letter), `candidates` [N, C] token ids of
        the letters there (-1: no such option), `choice` [N] the right one.
    """
    import torch

    found = []
    for example, text, ids, labels in zip(examples, texts, tensors["input_ids"], tensors["labels"], strict=True):
        places = (labels != -100).nonzero().flatten()
        offset, candidates, choice = _choice(tokenizer, example, text, ids[places].tolist())
        found.append((int(places[0]) + offset if candidates else 0, candidates, choice))
    table = torch.full((len(found), max(1, *(len(tokens) for _, tokens, _ in found), 1)), -1)
    for row, (_, tokens, _) in enumerate(found):
        table[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    return {
        "position": torch.tensor([position for position, _, _ in found]),
        "candidates": table,
        "choice": torch.tensor([choice for _, _, choice in found]),
    }


def _choice(tokenizer: Any, example: Example, text: str, ids: list[int]) -> tuple[int, list[int], int]:
    """(offset of the letter's token in the answer, tokens of all letters there, the right one); no tokens: no choice.

    The letter's token is where the answer starts to differ once another letter stands in its place.
    """
    letter, count = option_letter(example.answer), len(example.choices) or option_count(example.prompt)
    if letter is None or not 0 <= ord(letter) - ord("A") < count or count < 2:
        return 0, [], 0
    found = _STATED.search(example.answer)
    at = found.start(1) if found else example.answer.index(letter)
    letters = [chr(ord("A") + i) for i in range(count)]
    versions = [
        answer_ids(tokenizer, text, example.answer[:at] + other + example.answer[at + 1 :]) for other in letters
    ]
    columns = list(zip(*versions, strict=False))
    offset = next((i for i, column in enumerate(columns) if len(set(column)) > 1), None)
    # One token must tell all options apart, or the letter cannot be chosen at one place.
    if offset is None or len(set(columns[offset])) < count or versions[ord(letter) - ord("A")] != ids:
        return 0, [], 0
    return offset, list(columns[offset]), ord(letter) - ord("A")
