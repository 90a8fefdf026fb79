"""`text-classification`: a text, or a pair of texts, and its class; from a table with columns text and label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from eas_search.models.options import Head
from eas_search.tasks.base import Example, Split, TaskOptions, require_examples
from eas_search.tasks.classes import ClassTask
from eas_search.tasks.sources import column, read_rows
from eas_search.tasks.texts import encode_texts

if TYPE_CHECKING:
    from eas_search.tasks.encoding import EncodedSplit


class TextClassificationOptions(TaskOptions):
    """Options of `text-classification`.

    Attributes:
        text, pair, label: columns of the first text, of the second one (None: there is none) and of the class.
        max_length: tokens after which a text is cut off; None: what the tokenizer says the model can read.
    """

    text: str = "text"
    pair: str | None = None
    label: str = "label"
    max_length: int | None = None


class TextClassification(ClassTask):
    """Classification of texts."""

    name: ClassVar[str] = "text-classification"
    head: ClassVar[Head] = "sequence-classification"
    Options: ClassVar[type[TaskOptions]] = TextClassificationOptions
    layout: ClassVar[str] = (
        "a table (csv, tsv, json, jsonl or parquet) with columns text and label, a folder with one per split, or a "
        "hub id"
    )
    options: TextClassificationOptions

    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`."""
        return {
            split: [self._example(row, f"row {i} of '{self.place}' ({split})") for i, row in enumerate(rows)]
            for split, rows in read_rows(self.place, self.name, self.layout).items()
        }

    def _example(self, row: Mapping[str, Any], where: str) -> Example:
        label = str(column(dict(row), [self.options.label], where))
        pair = None if self.options.pair is None else str(column(dict(row), [self.options.pair], where))
        return Example(None, str(column(dict(row), [self.options.text], where)), label, label, pair=pair)

    def encode(self, processor: Any, examples: Sequence[Example]) -> EncodedSplit:
        """Texts as tensors [N, n], the classes as labels [N]."""
        import torch

        from eas_search.tasks.encoding import EncodedSplit
        from eas_search.tasks.scoring import CLASS_MATCH

        require_examples(self.name, examples)
        pairs = [(example.prompt, example.pair) for example in examples]
        tensors = encode_texts(processor, pairs, self.options.max_length)
        tensors["labels"] = torch.tensor([self.class_index(example) for example in examples])
        return EncodedSplit(tensors, tuple(example.group for example in examples), CLASS_MATCH)
