"""VQA accuracy: how far an answer agrees with several people's (Antol et al., ICCV 2015; Goyal et al., CVPR 2017)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from eas_search.tasks.vqa_normalise import normalise_answer

AGREEING = 3  # as many people as must agree with an answer for it to be fully right


def vqa_accuracy(answer: str, annotators: Sequence[str]) -> float:
    """Mean over all subsets that leave one annotator out of min(agreeing / 3, 1), from 0 to 1.

    All answers are normalised first. Without annotators it is 0.
    """
    given = [normalise_answer(said) for said in annotators]
    return agreement(given.count(normalise_answer(answer)), len(given))


def agreement(matches: int, annotators: int) -> float:
    """VQA accuracy of an answer that `matches` of the annotators gave.

    Leaving out one of the `matches` leaves one fewer, leaving out another one leaves them all.
    """
    if annotators == 0:
        return 0.0
    fewer, same = min((matches - 1) / AGREEING, 1.0), min(matches / AGREEING, 1.0)
    return (matches * fewer + (annotators - matches) * same) / annotators


def soft_scores(annotators: Sequence[str]) -> dict[str, float]:
    """Every answer that somebody gave, normalised, with its VQA accuracy: the soft target of training."""
    counts = Counter(normalise_answer(said) for said in annotators)
    return {answer: agreement(count, len(annotators)) for answer, count in counts.items()}


def answer_vocabulary(answers: Iterable[str], least: int) -> tuple[str, ...]:
    """Normalised answers that occur at least `least` times, in the order in which they occur first."""
    counts = Counter(normalise_answer(answer) for answer in answers)
    return tuple(answer for answer, count in counts.items() if count >= least and answer)
