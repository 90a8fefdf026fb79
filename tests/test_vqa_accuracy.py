"""VQA accuracy, answer normalisation and word recall, against figures by hand and brute force."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eas_search.tasks.scores import class_worth, word_recall
from eas_search.tasks.vqa_accuracy import agreement, answer_vocabulary, soft_scores, vqa_accuracy
from eas_search.tasks.vqa_normalise import CONTRACTIONS, normalise_answer

ANSWERS = st.sampled_from(["red", "blue", "green", "yes"])


def by_subsets(answer: str, annotators: list[str]) -> Fraction:
    """The definition: all subsets that leave one annotator out."""
    subsets = list(itertools.combinations(annotators, len(annotators) - 1))
    parts = [min(Fraction(sum(said == answer for said in subset), 3), Fraction(1)) for subset in subsets]
    return sum(parts, Fraction(0)) / len(parts)


@settings(max_examples=400, deadline=None)
@given(ANSWERS, st.lists(ANSWERS, min_size=2, max_size=12))
def test_vqa_accuracy_is_the_mean_over_all_subsets(answer: str, annotators: list[str]) -> None:
    assert vqa_accuracy(answer, annotators) == pytest.approx(float(by_subsets(answer, annotators)), abs=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(ANSWERS, min_size=10, max_size=10))
def test_the_targets_of_training_are_what_each_answer_would_score(annotators: list[str]) -> None:
    scores = soft_scores(annotators)
    assert set(scores) == set(annotators)
    for answer, score in scores.items():
        assert score == pytest.approx(float(by_subsets(answer, annotators)), abs=1e-12)


@pytest.mark.parametrize(("people", "score"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (7, 1.0), (10, 1.0)])
def test_the_published_scores_of_ten_annotators(people: int, score: float) -> None:
    assert agreement(people, 10) == pytest.approx(score, abs=1e-12)


def test_no_annotator_agrees_with_nothing() -> None:
    assert vqa_accuracy("red", []) == 0.0


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Dog", "dog"),
        ("T-shirt", "t shirt"),
        ("p.m.", "pm"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("100,978", "100978"),
        ("red, white", "red white"),
        ("two", "2"),
        ("none", "0"),
        ("Ten dogs", "10 dogs"),
        ("a an the", ""),
        ("girl's", "girl's"),
        ("2:50 PM", "2:50 pm"),
        ("dont", "don't"),
        ("don't", "don't"),
        ("couldntve", "couldn't've"),
        ("couldn'tve", "couldn't've"),
        ("im", "i'm"),
        ("whats", "what's"),
        ("its", "its"),
        ("were", "were"),
        ("well", "well"),
        ("yes!", "yes"),
        ("black/white", "black white"),
        ("no\tdogs\n", "no dogs"),
        ("$5", "5"),
        ("café", "café"),
        ("snake_case", "snake case"),
    ],
)
def test_normalised_answers(text: str, plain: str) -> None:
    assert normalise_answer(text) == plain


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abcdeIT' ,.:-!?019\n", max_size=30))
def test_normalising_twice_changes_nothing_and_leaves_only_what_may_stand(text: str) -> None:
    once = normalise_answer(text)
    assert normalise_answer(once) == once
    assert set(once) <= set("abcdeit' .:019")
    assert not {"a", "an", "the"} & set(once.split())
    assert normalise_answer(text.upper()) == once


def test_every_contraction_is_the_word_with_its_apostrophe() -> None:
    assert len(CONTRACTIONS) > 90
    for plain, text in CONTRACTIONS.items():
        assert text.replace("'", "") == plain
        assert normalise_answer(plain) == normalise_answer(text) == text


def test_the_vocabulary_counts_normalised_answers_in_their_first_order() -> None:
    said = ["Two", "red", "2", "Red.", "blue", "two", "red", "the", "a", "an", "the"]
    assert answer_vocabulary(said, 3) == ("2", "red")
    assert answer_vocabulary(said, 1) == ("2", "red", "blue")
    assert answer_vocabulary(said, 4) == ()


def test_the_worth_of_a_class_is_that_of_the_likeliest() -> None:
    random_ = random.Random(0)
    logits = torch.tensor([[random_.gauss(0, 1) for _ in range(7)] for _ in range(300)])
    worth = torch.tensor([[random_.random() for _ in range(7)] for _ in range(300)])
    expected = [worth[i][max(range(7), key=lambda c, i=i: logits[i][c])].item() for i in range(300)]
    assert class_worth(logits, worth).tolist() == pytest.approx(expected)
    logits[4, 6] = float("nan")
    assert class_worth(logits, worth)[4] == 0.0


WORDS = st.lists(st.sampled_from(["left", "right", "lung", "heart", "x-ray", "the"]), max_size=8)


@settings(max_examples=300, deadline=None)
@given(WORDS, WORDS)
def test_word_recall_crosses_off_what_was_said(said: list[str], right: list[str]) -> None:
    left, wanted, hits = [word for word in said if word != "the"], [w for w in right if w != "the"], 0
    for word in wanted:
        if word in left:
            left.remove(word)
            hits += 1
    expected = hits / len(wanted) if wanted else 1.0
    assert word_recall(" ".join(said), " ".join(right)) == pytest.approx(expected)


def test_word_recall_by_hand() -> None:
    assert word_recall("The heart, and Lung!", "lung, heart") == 1.0
    assert word_recall("lung", "lung, heart, liver") == pytest.approx(1 / 3)
    assert word_recall("lung lung", "lung heart") == 0.5
    assert word_recall("", "lung") == 0.0
