"""`multiple-choice`: a question and several answers to it, scored one by one by an encoder's multiple-choice head.

The data is a table with columns question, choices and answer, or a folder in ScienceQA's own layout.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from eas_search.exceptions import TaskDataError
from eas_search.models.options import Head
from eas_search.skip_config import Pooling
from eas_search.tasks.base import Example, Split, TaskOptions, require_examples
from eas_search.tasks.science_columns import groups_of, nine_columns
from eas_search.tasks.science_files import PROBLEMS, read_captions, read_problems
from eas_search.tasks.sources import FileTask, column, read_rows
from eas_search.tasks.texts import encode_texts

if TYPE_CHECKING:
    from eas_search.tasks.encoding import EncodedSplit


class MultipleChoiceOptions(TaskOptions):
    """Options of `multiple-choice`.

    Attributes:
        question, choices, answer: columns; `choices` holds a list (in csv and tsv: a JSON list) or the hub's
            `{"text": [...], "label": [...]}`, `answer` the right one's label, its position from 0, its letter, or its
            text. A column of numbers holds positions, unless one of them can be none and all of them are texts.
        context: column with a text that goes before the question, if there is one.
        captions: whether ScienceQA's captions tell what a picture shows.
        max_length: tokens after which question and choice are cut off; None: what the model can read.
    """

    question: str = "question"
    choices: str = "choices"
    answer: str = "answer"
    context: str | None = None
    captions: bool = True
    max_length: int | None = None


@dataclass(frozen=True)
class _Row:
    """A question as it stands in the data; `labels` are what its choices are called, if they have names."""

    question: str
    choices: tuple[str, ...]
    labels: tuple[str, ...]
    answer: Any
    where: str

    @property
    def numbered(self) -> bool:
        """Whether the answer is a whole number that is no label."""
        whole = isinstance(self.answer, int) and not isinstance(self.answer, bool)
        return whole and str(self.answer) not in self.labels


class MultipleChoice(FileTask):
    """Questions with the answers to choose from."""

    name: ClassVar[str] = "multiple-choice"
    head: ClassVar[Head] = "multiple-choice"
    metric: ClassVar[str] = "accuracy"
    pooling: ClassVar[Pooling] = "all"
    Options: ClassVar[type[TaskOptions]] = MultipleChoiceOptions
    layout: ClassVar[str] = (
        "a table (json, jsonl, csv, tsv or parquet) with columns question, choices and answer, a folder with one per "
        "split, ScienceQA's folder, or a hub id"
    )
    options: MultipleChoiceOptions

    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`."""
        if (self.place / PROBLEMS).is_file():
            return self._scienceqa()
        rows = {
            split: [self._row(row, f"row {i} of '{self.place}' ({split})") for i, row in enumerate(part)]
            for split, part in read_rows(self.place, self.name, self.layout).items()
        }
        numbers = [row for part in rows.values() for row in part if row.numbered]
        texts = all(str(row.answer) in row.choices for row in numbers)
        counted = not texts or all(0 <= row.answer < len(row.choices) for row in numbers)
        return {
            split: [
                Example(None, row.question, row.choices[_position(row, counted)], "all", row.choices) for row in part
            ]
            for split, part in rows.items()
        }

    def _scienceqa(self) -> Mapping[Split, Sequence[Example]]:
        problems, splits = read_problems(self.place)
        captions = read_captions(self.place) if self.options.captions else {}

        def example(pid: str) -> Example:
            problem = problems[pid]
            choices = tuple(map(str, problem["choices"]))
            texts = (problem.get("hint"), captions.get(pid), problem["question"])
            return Example(
                None, " ".join(t for t in texts if t), choices[problem["answer"]], groups_of(problem), choices
            )

        return {split: [example(pid) for pid in pids] for split, pids in splits.items()}

    def _row(self, row: dict[str, Any], where: str) -> _Row:
        question = str(column(row, [self.options.question], where))
        if self.options.context is not None:
            question = f"{column(row, [self.options.context], where)} {question}"
        choices, labels = _choices(column(row, [self.options.choices], where), where)
        return _Row(question, choices, labels, column(row, [self.options.answer], where), where)

    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """Question and choice as one pair of texts: tensors [N, C, n], the right one's position as labels [N].

        Where a question has fewer than C choices, empty ones take the places of the rest; they never count as answers.
        """
        import torch

        from eas_search.tasks.encoding import EncodedSplit
        from eas_search.tasks.scoring import CLASS_MATCH, Scoring

        require_examples(self.name, examples)
        most = max(len(example.choices) for example in examples)
        padded = [(*e.choices, *[""] * (most - len(e.choices))) for e in examples]
        pairs = [(e.prompt, choice) for e, choices in zip(examples, padded, strict=True) for choice in choices]
        flat = encode_texts(processor, pairs, self.options.max_length)
        tensors = {name: value.unflatten(0, (len(examples), most)) for name, value in flat.items()}
        tensors["labels"] = torch.tensor([example.choices.index(example.answer) for example in examples])
        possible = torch.arange(most) < torch.tensor([[len(example.choices)] for example in examples])
        groups = tuple(example.group for example in examples)
        report = CLASS_MATCH.report if set(groups) == {"all"} else nine_columns
        scoring = Scoring(self.metric, CLASS_MATCH.score, report)
        return EncodedSplit(tensors, groups, scoring, {"possible": possible})


def _choices(value: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(choices, their labels) of a row: a list, the JSON of one, or the hub's `{"text": [...], "label": [...]}`."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            value = None
    labels = None
    if isinstance(value, dict):
        value, labels = value.get("text"), value.get("label")
    if not isinstance(value, list) or len(value) < 2:
        raise TaskDataError(f'{where} has choices that are no list of two or more; expected e.g. ["red", "blue"].')
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(value)):
        raise TaskDataError(
            f"{where} has {len(value)} choices with the labels {labels!r:.60}; expected a list with one for each."
        )
    return tuple(map(str, value)), tuple(str(label).strip() for label in labels or ())


def _position(row: _Row, counted: bool) -> int:
    """Where the right choice stands; `counted`: the numbers of the column are positions. Raises TaskDataError."""
    text = str(row.answer).strip()
    if text in row.labels:
        return row.labels.index(text)
    if text in row.choices and not (row.numbered and counted):
        return row.choices.index(text)
    position = int(text) if text.isdecimal() else ord(text) - ord("A") if len(text) == 1 else -1
    if not 0 <= position < len(row.choices):
        raise TaskDataError(
            f"{row.where} has answer '{text[:40]}', which names none of its {len(row.choices)} choices; expected a "
            "position from 0, a letter from A, or the choice itself."
        )
    return position
