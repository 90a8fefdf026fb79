"""`vqa`: questions in LLaVA's conversation format, about images in a folder or about nothing but their text.

Every pair of a human turn and the answer to it is a sample of its own, without the turns before; `turns: first` keeps
only the first pair of a conversation, for data whose later questions refer to earlier answers. A sample that answers
with the letter of a listed option counts as right when that letter is the most likely one of the listed; any other when
the answer's text is right but for case, punctuation and articles.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from eas_search.exceptions import TaskDataError
from eas_search.tasks.answers import AnswerTask
from eas_search.tasks.base import Example, Split, TaskOptions
from eas_search.tasks.sources import FileTask
from eas_search.tasks.splits import split_named

if TYPE_CHECKING:
    from torch import Tensor

    from eas_search.tasks.scoring import Scoring

IMAGE = "<image>"


class VqaOptions(TaskOptions):
    """Options of `vqa`.

    Attributes:
        images: folder that the records' image names are relative to; None: `images` beside the annotations if there is
            such a folder, else the annotations' own.
        turns: `all` question-and-answer pairs of a conversation, or the `first`.
        group_by: field of a record that scores are broken down by.
        scoring: `teacher-forced`, one forward pass per sample, or `generated`, which lets the model answer freely.
    """

    images: Path | None = None
    turns: Literal["all", "first"] = "all"
    group_by: str = "answer_type"
    scoring: Literal["teacher-forced", "generated"] = "teacher-forced"


class Vqa(FileTask, AnswerTask):
    """Visual question answering, or any short answers, from conversation files."""

    name: ClassVar[str] = "vqa"
    metric: ClassVar[str] = "accuracy"
    Options: ClassVar[type[TaskOptions]] = VqaOptions
    from_hub: ClassVar[bool] = False
    layout: ClassVar[str] = (
        "conversations in LLaVA's format, a .json or .jsonl file or a folder with train.json, validation.json and "
        "test.json"
    )
    source: ClassVar[str] = ""  # where the data set's pictures come from, for messages
    options: VqaOptions

    def read(self) -> Mapping[Split, Sequence[Example]]:
        """See `FileTask.read`. Among several files of a split (train.json, train20.json) the choice is the user's."""
        found: dict[Split, list[Example]] = {}
        for split, file in self._files().items():
            found[split] = [example for record in read_records(file) for example in self.samples(record, file)]
        return found

    def key(self, example: Example) -> str:
        """Questions about one picture stay together."""
        return self.picture(example.image) if example.image is not None else example.prompt

    def _files(self) -> dict[Split, Path]:
        if self.place.is_file():
            return {"train": self.place}
        files = sorted(path for path in self.place.iterdir() if path.suffix.lower() in (".json", ".jsonl"))
        files = [file for file in files if self.wanted(file)]
        found: dict[Split, Path] = {}
        for file in files:
            split = split_named(file.stem) or ("train" if len(files) == 1 else None)
            if split in found:
                raise TaskDataError(
                    f"'{found[split].name}' and '{file.name}' in '{self.place}' are both for {split}; expected one "
                    "file per split; move one away."
                )
            if split is not None:
                found[split] = file
        if not found:
            raise TaskDataError(f"folder '{self.place}' has no file for task '{self.name}'; expected {self.layout}.")
        return found

    def wanted(self, file: Path) -> bool:
        """Whether a file of annotations in the folder is to be read."""
        return True

    def samples(self, record: Any, file: Path) -> Iterator[Example]:
        """The question-and-answer pairs of a record. Raises TaskDataError."""
        turns = record.get("conversations") if isinstance(record, dict) else None
        where = f"record {record.get('id', '?') if isinstance(record, dict) else record!r:.40} of '{file}'"
        if not isinstance(turns, list) or not all(isinstance(t, dict) and {"from", "value"} <= t.keys() for t in turns):
            raise TaskDataError(f"{where} has no conversation; expected a list of turns with 'from' and 'value'.")
        texts = [str(turn["value"]).replace(IMAGE, "").strip() for turn in turns]
        speakers = [turn["from"] for turn in turns]
        pairs = [
            i
            for i in range(len(turns) - 1)
            if speakers[i] in ("human", "user") and speakers[i + 1] not in ("human", "user", "system")
        ]
        if not pairs:
            raise TaskDataError(
                f"{where} has no question with an answer; expected a turn of 'human', then one of 'gpt'."
            )
        named = _picture_of(record, where)
        if named is None and any(_shows(str(turns[i]["value"])) for i in pairs):
            raise TaskDataError(
                f"{where} asks about an {IMAGE} but has {record.get('image')!r:.40} for 'image'; expected the name of "
                f"a picture's file: add it, or take {IMAGE} out of the text."
            )
        image = None if named is None else self._image(named, file)
        group = str(record.get(self.options.group_by) or "all")
        for i in pairs if self.options.turns == "all" else pairs[:1]:
            yield Example(image, texts[i], texts[i + 1], group)

    def _image(self, image: str, file: Path) -> Path:
        folder = self.options.images
        if folder is None:
            folder = file.parent / "images" if (file.parent / "images").is_dir() else file.parent
        path = folder / image
        if not path.is_file():
            raise TaskDataError(
                f"image '{image}' named in '{file}' is not in '{folder}'; expected the data set's image folder"
                f"{self.source and f' from {self.source}'}: put it there or name it in task_options, images."
            )
        return path

    def scoring(self, tokenizer: Any, tensors: dict[str, Tensor]) -> Scoring:
        """Choice accuracy where an option letter is the answer, else exact match of the normalised text."""
        from eas_search.tasks.scoring import choice_or_text, generated

        if self.options.scoring == "generated":
            return generated(self.metric, tokenizer, tensors)
        return choice_or_text(self.metric, tokenizer)

    def extras(
        self, tokenizer: Any, examples: Sequence[Example], texts: Sequence[str], tensors: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Where option letters are chosen."""
        from eas_search.tasks.choices import choice_tensors

        return choice_tensors(tokenizer, examples, texts, tensors)


def _shows(text: str) -> bool:
    """Whether a question shows a picture: the placeholder stands at an end of it or on a line of its own.

    Elsewhere it may be what the question is about.
    """
    text = text.strip()
    return text.startswith(IMAGE) or text.endswith(IMAGE) or f"\n{IMAGE}\n" in text


def _picture_of(record: dict[str, Any], where: str) -> str | None:
    """The name of a record's one picture, under `image` or in a list under `images`; None if it has none."""
    key = "image" if record.get("image") else "images"
    named = record.get(key) or []
    names = named if isinstance(named, list) else [named]
    if len(names) > 1 or not all(isinstance(name, str | int) for name in names):
        raise TaskDataError(
            f"{where} has {named!r:.60} for '{key}'; expected the name of one picture's file: leave out records with "
            "several, or write a task of your own."
        )
    return str(names[0]) if names else None


def read_records(file: Path) -> list[Any]:
    """The records of a JSON list or of JSON lines. Raises TaskDataError, naming file and line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".jsonl":
            # Only "\n" ends a line: `splitlines` would also cut at separators that JSON texts may hold, such as U+2028.
            return [json.loads(line) for line in text.split("\n") if line.strip()]
        content = json.loads(text)
    except (OSError, ValueError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise TaskDataError(f"file '{file}' cannot be read as JSON ({reason}); expected a list of records.") from error
    if not isinstance(content, list):
        raise TaskDataError(f"file '{file}' holds a {type(content).__name__}; expected a list of records.")
    return content
