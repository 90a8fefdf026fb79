"""pyarrow files in the convention of ViLT and METER: a record per image, with its texts and its picture's bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from eas_search.exceptions import TaskDataError

SOURCE = "the data preparation of ViLT (https://github.com/dandelin/ViLT/blob/master/DATA.md), which METER shares"


@dataclass(frozen=True)
class ArrowImage:
    """A picture in an arrow file, read from it when it is wanted."""

    file: Path
    column: str
    row: int

    def read_bytes(self) -> bytes:
        """The picture's file. Raises TaskDataError."""
        content: bytes = open_table(self.file)[self.column][self.row].as_py()
        return content


def arrow_rows(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of these columns; pictures are left where they are, see `ArrowImage`. Raises TaskDataError."""
    table = open_table(file)
    if missing := [name for name in columns if name not in table.column_names]:
        has = ", ".join(table.column_names)
        raise TaskDataError(f"'{file}' has no column '{missing[0]}', only {has}; expected a file made by {SOURCE}.")
    for batch in table.select(list(columns)).to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


@lru_cache(maxsize=16)
def open_table(file: Path) -> Any:
    """The table of an arrow file, mapped into memory. Raises TaskDataError."""
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        reason = " ".join(str(error).split())[:160]
        raise TaskDataError(
            f"'{file}' cannot be read as an arrow file ({reason}); expected one made by {SOURCE}."
        ) from error
