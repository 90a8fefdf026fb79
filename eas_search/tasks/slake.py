"""`slake`: questions about medical images (Liu et al., ISBI 2021), in LLaVA's conversation format.

Answers to closed questions are right when their text is right but for case, punctuation and articles; open ones score
the share of the right answer's words that are said. Both are judged in what the model generates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from eas_search.exceptions import TaskDataError
from eas_search.tasks.base import Example, TaskOptions
from eas_search.tasks.vqa import Vqa, VqaOptions

if TYPE_CHECKING:
    from torch import Tensor

    from eas_search.tasks.scoring import Batch, Scoring

SOURCE = "https://www.med-vqa.com/slake (imgs.zip)"
KINDS = ("OPEN", "CLOSED")


class SlakeOptions(VqaOptions):
    """Options of `slake`: those of `vqa`.

    Attributes:
        group_by: open and closed questions are told apart by it.
        scoring: with `teacher-forced` every token of an answer is judged with the right ones before it, which is faster
            and flatters open answers.
    """

    group_by: Literal["answer_type"] = "answer_type"
    scoring: Literal["teacher-forced", "generated"] = "generated"


class Slake(Vqa):
    """SLAKE: recall of open answers, accuracy of closed ones."""

    name: ClassVar[str] = "slake"
    metric: ClassVar[str] = "recall/accuracy"
    Options: ClassVar[type[TaskOptions]] = SlakeOptions
    layout: ClassVar[str] = (
        "SLAKE in LLaVA's format with an answer_type of OPEN or CLOSED: a folder with slake_train.json, "
        "slake_test.json and images/xmlabN/source.jpg (annotations: https://github.com/DoubtedSteam/EAS; images: "
        f"{SOURCE})"
    )
    source: ClassVar[str] = SOURCE

    def samples(self, record: Any, file: Path) -> Iterator[Example]:
        """See `Vqa.samples`."""
        for example in super().samples(record, file):
            if example.group not in KINDS:
                raise TaskDataError(
                    f"record {record.get('id', '?')} of '{file}' has answer_type '{example.group[:20]}'; expected OPEN "
                    "or CLOSED."
                )
            yield example

    def scoring(self, tokenizer: Any, tensors: dict[str, Tensor]) -> Scoring:
        """Recall where `open` says so, else the match of the texts."""
        import torch

        from eas_search.tasks.scores import normalised, word_recall
        from eas_search.tasks.scoring import Scoring, forced_texts, generated_texts, longest_answer

        longest, forced = longest_answer(tensors), self.options.scoring == "teacher-forced"

        def score(model: Any, inputs: Batch, extras: Batch) -> Tensor:
            texts = (
                forced_texts(model, inputs, tokenizer) if forced else generated_texts(model, inputs, tokenizer, longest)
            )
            values = [
                word_recall(said, right) if is_open else float(normalised(said) == normalised(right))
                for (said, right), is_open in zip(texts, extras["open"].tolist(), strict=True)
            ]
            return torch.tensor(values, dtype=torch.float64)

        return Scoring(self.metric, score, answers_follow=True, labelled=True)

    def extras(
        self, tokenizer: Any, examples: Sequence[Example], texts: Sequence[str], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """`open` [N]: which questions are open."""
        import torch

        return {"open": torch.tensor([example.group == "OPEN" for example in examples])}
