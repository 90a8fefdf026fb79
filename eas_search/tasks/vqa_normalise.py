"""Answers to visual questions without what does not matter, as the evaluation of VQA describes it (visualqa.org).

Lower case; full stops only before digits; number words as digits; no articles; contractions with their apostrophe; any
other punctuation mark a space, except apostrophes and colons; no comma between digits.
"""

from __future__ import annotations

import re

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
DIGITS = {"none": "0", **{word: str(i) for i, word in enumerate(NUMBERS)}}
ARTICLES = ("a", "an", "the")
_ANYBODY = ("somebody", "someone", "something", "that")
# Contractions by their ending. Where the word without its apostrophe is another word it stays as it is, and the
# contraction is not here: its, were, well, ill, id, hell, shell, shed, wed.
_BEFORE = {
    "n't": (
        *("ai", "are", "ca", "could", "did", "does", "do", "had", "has", "have", "is", "might", "must", "need"),
        *("ought", "sha", "should", "was", "were", "wo", "would"),
    ),
    "n't've": ("could", "had", "might", "should", "would"),
    "'s": (*_ANYBODY, "there", "who", "what", "where", "when", "why", "how", "he", "she", "let"),
    "'re": ("there", "they", "what", "where", "why", "you"),
    "'ve": ("could", "might", "must", "not", "should", "they", "what", "where", "who", "would", "i", "we", "you"),
    "'ll": (*_ANYBODY, "they", "who", "what", "why", "how", "it", "you"),
    "'d": (*_ANYBODY, "there", "they", "who", "where", "how", "he", "it", "you"),
    "'d've": (*_ANYBODY, "there", "they", "who", "he", "she", "it", "you", "i", "we"),
}
_SINGLE = ("i'm", "ma'am", "o'clock", "'twas", "y'all", "y'all'll")
_WRITTEN = (*_SINGLE, *(f"{word}{ending}" for ending, words in _BEFORE.items() for word in words))
CONTRACTIONS = {text.replace("'", ""): text for text in _WRITTEN}


def normalise_answer(text: str) -> str:
    """The form in which answers are compared: "The T-shirt." → "t shirt", "two" → "2", "dont" → "don't"."""
    text = re.sub(r"(?<=\d),(?=\d)", "", text.lower())
    text = re.sub(r"\.(?!\d)", "", text)
    words = re.sub(r"[^\w\s.':]|_", " ", text).split()
    words = [DIGITS.get(word, word) for word in words if word not in ARTICLES]
    return " ".join(_contracted(word) for word in words)


def _contracted(word: str) -> str:
    """With every apostrophe of a contraction, of which some may be there already: "couldn'tve" → "couldn't've"."""
    return CONTRACTIONS.get(word.replace("'", ""), word)
