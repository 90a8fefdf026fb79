"""A disk without space as one line, whichever library came upon it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eas_search.exceptions import StorageError

NO_SPACE = ("no space left", "disk is full", "quota exceeded")  # as the system, SQLite and safetensors say it


class FullDisk(StorageError):
    """There is no space left for what should be written."""


@contextmanager
def full_disk_explained(folder: Path) -> Iterator[None]:
    """One line where the disk of `folder` is full, whichever library came upon it.

    Raises:
        FullDisk: that was the cause of an error inside.
    """
    try:
        yield
    except Exception as error:  # Optuna, SQLAlchemy, safetensors and the system each raise their own kinds here
        if isinstance(error, FullDisk) or not _says_full(error):
            raise
        raise FullDisk(
            f"{str(folder)!r} cannot be written: no space left on its disk; expected room for what belongs there: free "
            "some and run the same command again: nothing is lost"
        ) from error


def _says_full(error: BaseException | None) -> bool:
    """Whether an error, or one from which it was raised, is about a full disk."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error).lower() for words in NO_SPACE):
            return True
        error = error.__cause__ or error.__context__
    return False
