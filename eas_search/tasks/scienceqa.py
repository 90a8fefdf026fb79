"""`scienceqa`: multiple-choice science questions in the data set's own layout (Lu et al., NeurIPS 2022).

The folder holds `problems.json`, `pid_splits.json` and, if wanted, `captions.json` and `images/SPLIT/PID/FILE`. Prompts
follow the authors' format codes: before the hyphen stands what is asked (Question, Context, Multiple options; Lecture
and Explanation may be added), behind it what is answered (Answer, Lecture, Explanation), each in this order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from eas_search.tasks.answers import AnswerTask
from eas_search.tasks.base import Example, Split, TaskOptions
from eas_search.tasks.choices import option_letter
from eas_search.tasks.science_columns import groups_of, nine_columns
from eas_search.tasks.science_files import LETTERS, PID_SPLITS, SCIENCEQA, read_captions, read_problems
from eas_search.tasks.sources import FileTask

if TYPE_CHECKING:
    from torch import Tensor

    from eas_search.tasks.scoring import Scoring


class ScienceQaOptions(TaskOptions):
    """Options of `scienceqa`.

    Attributes:
        prompt: format code, e.g. QCM-A, QCM-AE, QCM-ALE, QCM-LEA. Where the answer is not the first thing said, it is
            judged in what the model generates, which is slower.
        captions: whether `captions.json` tells what a picture shows.
        images: whether pictures are given to the model; None: if there is a folder `images`.
        part: which problems: all, those with a picture, or those without.
    """

    prompt: str = "QCM-A"
    captions: bool = True
    images: bool | None = None
    part: Literal["all", "image", "text"] = "all"

    @field_validator("prompt")
    @classmethod
    def _known_format(cls, value: str) -> str:
        asked, _, said = value.upper().partition("-")
        fits = set(asked) <= set("QCMLE") and {"Q", "M"} <= set(asked) and set(said) <= set("ALE") and "A" in said
        if not fits or any(len(set(part)) < len(part) for part in (asked, said)) or set(asked) & set(said):
            raise ValueError("expected a format code such as QCM-A, QCM-AE, QCM-ALE or QCM-LEA")
        return value.upper()


class ScienceQa(FileTask, AnswerTask):
    """ScienceQA as a generation task."""

    name: ClassVar[str] = "scienceqa"
    metric: ClassVar[str] = "accuracy"
    Options: ClassVar[type[TaskOptions]] = ScienceQaOptions
    from_hub: ClassVar[bool] = False
    layout: ClassVar[str] = SCIENCEQA
    options: ScienceQaOptions

    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`."""
        problems, splits = read_problems(self.place)
        captions = read_captions(self.place) if self.options.captions else {}
        images = self.place / "images"
        shown = images.is_dir() if self.options.images is None else self.options.images
        found: dict[Split, list[Example]] = {}
        for split, pids in splits.items():
            wanted = [
                pid
                for pid in pids
                if self.options.part == "all" or bool(problems[pid].get("image")) == (self.options.part == "image")
            ]
            if not wanted:
                continue
            folder = images / PID_SPLITS[split]
            found[split] = [
                _example(problems[pid], self.options.prompt, captions.get(pid, ""), folder / pid if shown else None)
                for pid in wanted
            ]
        return found

    def scoring(self, tokenizer: Any, tensors: dict[str, Tensor]) -> Scoring:
        """Accuracy of the chosen letter, with the nine columns of the published tables."""
        from eas_search.tasks.scoring import choice_or_text, generated

        if self.options.prompt.partition("-")[2][0] == "A":
            return choice_or_text(self.metric, tokenizer, nine_columns)
        # Teacher forcing would show the model the right explanation before it answers.
        return generated(self.metric, tokenizer, tensors, nine_columns, _same_letter)

    def extras(
        self, tokenizer: Any, examples: Sequence[Example], texts: Sequence[str], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Where the letter is chosen."""
        from eas_search.tasks.choices import choice_tensors

        return choice_tensors(tokenizer, examples, texts, tensors)


def _same_letter(said: str, right: str) -> bool:
    return option_letter(said) is not None and option_letter(said) == option_letter(right)


def _example(problem: dict[str, Any], code: str, caption: str, folder: Path | None) -> Example:
    choices = tuple(problem["choices"])
    asked, _, said = code.partition("-")
    letter = LETTERS[problem["answer"]]
    context = " ".join(text for text in (problem.get("hint"), caption) if text) or "N/A"
    parts = {
        "Q": f"Question: {problem['question']}",
        "C": f"Context: {context}",
        "M": "Options: " + " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices)),
        "L": problem.get("lecture") or "",
        "E": problem.get("solution") or "",
    }
    prompt = "\n".join([*(parts[c] for c in asked if parts[c]), "Answer:"])
    reasons = {c: " ".join(parts[c].split()) for c in "LE"}
    answer = f"The answer is {letter}."
    before, _, after = said.partition("A")
    because = " ".join(reasons[c] for c in after if reasons[c])
    text = " ".join([*(reasons[c] for c in before if reasons[c]), answer])
    image = folder / problem["image"] if folder is not None and problem.get("image") else None
    full = f"{text} BECAUSE: {because}" if because else text
    return Example(image, prompt, full, groups_of(problem), choices)
