"""Where the data of a task lives: a local file or folder, or a data set of the hub, all read through `datasets`."""

from __future__ import annotations

import hashlib
import logging
import re
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from eas_search.exceptions import TaskDataError
from eas_search.tasks.arrow import ArrowImage
from eas_search.tasks.base import SPLITS, Example, Split, Task, limited
from eas_search.tasks.order import by_digest
from eas_search.tasks.splits import NAMES, complete, split_named

# Only an empty cell is missing: pandas would also take words such as "NA", "None" and "null" for nothing.
CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
READERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text"}
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
Row = dict[str, Any]


class FileTask(Task):
    """A task that reads the user's data; subclasses say how (`read`).

    Attributes:
        layout: what the data must look like, for messages.
        from_hub: whether `data` may be the id of a data set of the hub.
    """

    layout: ClassVar[str]
    from_hub: ClassVar[bool] = True

    def __init__(self, data: Path | None = None, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(data, options)
        self._splits: dict[Split, list[Example]] | None = None
        if data is None:
            raise TaskDataError(f"task '{self.name}' needs data; expected {self.layout}; name it with --data.")
        if not data.exists() and not (self.from_hub and is_hub_id(str(data))):
            raise TaskDataError(f"data '{data}' of task '{self.name}' does not exist; expected {self.layout}.")

    @property
    def place(self) -> Path:
        """What the user named with --data."""
        assert self.data is not None, "refused by the constructor"
        return self.data

    @abstractmethod
    def read(self) -> Mapping[Split, Sequence[Example]]:
        """All examples by split; those of no split under `train`. Raises TaskDataError."""

    def key(self, example: Example) -> str:
        """What must not be in two splits at once; by default the question with its picture and choices."""
        parts = (self.picture(example.image), example.prompt, example.pair, example.choices)
        return "\n".join(str(part) for part in parts)

    def kind(self, example: Example) -> str | None:
        """The class of an example; None where answers are no classes."""
        return None

    def content(self, example: Example) -> str:
        """All that tells an example apart, wherever the data lies."""
        pictures = map(self.picture, (example.image, *example.others))
        return "\n".join(map(str, (*pictures, example.prompt, example.pair, example.choices, example.answer)))

    def arranged(self, examples: Sequence[Example]) -> list[Example]:
        """The examples of a split in the order in which a limit takes them; by default as good as random."""
        return by_digest(examples, self.content)

    def picture(self, image: Any) -> str:
        """What tells a picture apart wherever the data lies: its file's path below the data, or a hash of its bytes.

        With absolute paths other examples would be set apart once the data is moved.
        """
        if isinstance(image, ArrowImage):
            return f"{self.picture(image.file)} {image.column} {image.row}"
        if hasattr(image, "tobytes"):  # an opened picture, which would be told apart by its address
            return f"{image.size} {getattr(image, 'mode', '')} {hashlib.sha256(image.tobytes()).hexdigest()}"
        if isinstance(image, bytes):
            return hashlib.sha256(image).hexdigest()
        folder = self.place.parent if self.place.is_file() else self.place
        for base in (getattr(self.options, "images", None), folder):
            if base is not None and isinstance(image, Path) and image.is_relative_to(base):
                return image.relative_to(base).as_posix()
        return str(image)

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """See `Task.examples`. A split that the data lacks is set apart from the training examples."""
        limited(dict.fromkeys(SPLITS, 1), split, limit)  # refuses an unknown split before anything is read
        if self._splits is None:
            found, note = complete(self.name, self.read(), self.key, self.kind)
            self._splits = {name: self.arranged(part) for name, part in found.items()}
            self.notes += [] if note is None else [note]
        return self._splits[split][: limited({s: len(e) for s, e in self._splits.items()}, split, limit)]


def is_hub_id(text: str) -> bool:
    """Whether `text` can be the id of a data set of the hub, `name` or `owner/name`, rather than a path."""
    return bool(_HUB_ID.fullmatch(text)) and Path(text).suffix not in READERS


def read_rows(data: Path, name: str, layout: str) -> dict[Split, list[Row]]:
    """Rows by split of a table: one file, a folder with a file per split, or a data set of the hub.

    Files whose names speak of no split count as training data. Nothing is fetched for a local path.

    Raises:
        TaskDataError: in one line, what is wrong with which file.
    """
    if not data.exists():
        return _from_hub(data, name, layout)
    files = [data] if data.is_file() else sorted(path for path in data.iterdir() if path.suffix.lower() in READERS)
    if not files:
        kinds = ", ".join(READERS)
        raise TaskDataError(
            f"folder '{data}' has no file of a known kind ({kinds}) for task '{name}'; expected {layout}."
        )
    rows: dict[Split, list[Row]] = {}
    for file in files:
        split = split_named(file.stem) if data.is_dir() else None
        rows.setdefault(split or "train", []).extend(read_file(file, name, layout))
    return rows


def read_file(file: Path, name: str, layout: str) -> list[Row]:
    """Rows of one table file; a text file has one row per paragraph, in column `text`. Raises TaskDataError."""
    kind = READERS.get(file.suffix.lower())
    if kind is None:
        raise TaskDataError(f"file '{file}' of task '{name}' is of no known kind; expected {layout}.")
    further: dict[str, Any] = {"text": {"sample_by": "paragraph"}, "csv": CSV}.get(kind, {})
    if file.suffix.lower() == ".tsv":
        further = {**further, "sep": "\t"}
    import datasets

    with quiet_datasets():
        try:
            # A message of `datasets` says little; that of its cause says what is wrong with the file.
            found = datasets.load_dataset(kind, data_files={"train": [_escaped(file)]}, split="train", **further)
        except Exception as error:  # readers raise many kinds for damaged files
            reason = " ".join(str(error.__cause__ or error).split())[:160]
            raise TaskDataError(
                f"file '{file}' of task '{name}' cannot be read ({reason}); expected {layout}."
            ) from error
        return named_classes(found)


def _escaped(file: Path) -> str:
    """A path in which no character is a pattern."""
    return re.sub(r"([*?\[\]])", r"[\1]", str(file.absolute()))


def _from_hub(data: Path, name: str, layout: str) -> dict[Split, list[Row]]:
    import datasets

    with quiet_datasets():
        try:
            found = datasets.load_dataset(str(data))
        except Exception as error:  # the hub's client raises many kinds
            reason = " ".join(str(error).split())[:160]
            raise TaskDataError(
                f"data '{data}' of task '{name}' is no local file or folder and cannot be had from the hub ({reason}); "
                f"expected {layout}."
            ) from error
        rows: dict[Split, list[Row]] = {}
        for part in found:
            if part.lower() in NAMES:
                rows.setdefault(NAMES[part.lower()], []).extend(named_classes(found[part]))
        if not rows:
            raise TaskDataError(f"data set '{data}' has splits {', '.join(found)}; expected train, validation or test.")
        return rows


def named_classes(table: Any) -> list[Row]:
    """Rows of a data set with the names of its classes in place of their numbers; pictures stay compressed."""
    import datasets

    for column, feature in table.features.items():
        if isinstance(feature, datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
    names = {column: f.names for column, f in table.features.items() if type(f).__name__ == "ClassLabel"}
    return [
        {column: names[column][v] if column in names and v >= 0 else v for column, v in row.items()} for row in table
    ]


@contextmanager
def quiet_datasets() -> Iterator[None]:
    """Without the progress bars of `datasets`: a search has its own display."""
    import datasets

    before = datasets.utils.logging.get_verbosity()
    datasets.utils.logging.set_verbosity(logging.ERROR)
    bars = datasets.utils.are_progress_bars_disabled()
    datasets.utils.disable_progress_bars()
    try:
        yield
    finally:
        datasets.utils.logging.set_verbosity(before)
        if not bars:
            datasets.utils.enable_progress_bars()


def column(row: Row, names: Iterable[str], where: str) -> Any:
    """The value of the first of these columns that a row has. Raises TaskDataError."""
    wanted = list(names)
    for name in wanted:
        if row.get(name) is not None:
            return row[name]
    has = ", ".join(map(str, row)) or "none"
    raise TaskDataError(f"{where} has no '{wanted[0]}'; expected it among {has}; name the right one in task_options.")
