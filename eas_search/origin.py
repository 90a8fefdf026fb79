"""What an output folder's stages were computed from, so that another search does not go on with them.

The same command resumes a search. Between two runs people correct a table, train a model further, or give another seed:
the folder's baseline, supernet and finalists would then be of one thing and the new trials of another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from eas_search.exceptions import StorageError
from eas_search.fingerprints import fingerprint
from eas_search.settings import SearchSettings
from eas_search.stage_folder import StageFolder
from eas_search.tasks import Example
from eas_search.tasks.arrow import ArrowImage

FIRST_VALUES = 1024  # of every parameter, that are looked at: training changes all of them


def bind_settings(folder: StageFolder, settings: SearchSettings) -> None:
    """Record the settings on first use; refuse others later.

    Raises:
        StorageError: the stages were computed under other settings, or by a version that did not record them.
    """
    if folder.read("settings") is None and (folder.folder / "baseline.json").is_file():
        raise StorageError(
            f"output folder {str(folder.folder.parent)!r} holds a search of another version of eas_search; expected "
            "this one to go on with it: use that version, or choose another --output"
        )
    now = {"fingerprint": settings.fingerprint(), "settings": settings.model_dump(mode="json")}
    before = folder.once("settings", lambda: now)
    if before["fingerprint"] != now["fingerprint"]:
        raise StorageError(
            f"output folder {str(folder.folder.parent)!r} holds a search with other settings "
            f"({settings.first_difference(before['settings'])}); expected the same ones to resume: repeat them, or "
            "choose another --output"
        )


def bind_contents(folder: StageFolder, model: nn.Module, examples: Mapping[str, Sequence[Example]]) -> None:
    """Record what model and samples are on first use; refuse others later.

    Args:
        folder: of the stages.
        model: the original model; its weights are told by the first values of each.
        examples: by split. Of a picture in a file its name and size count.

    Raises:
        StorageError: they are not those that the stages were computed from.
    """
    now = {f"the data of split {name!r}": _digest(map(_told, found)) for name, found in examples.items()}
    weights = [parameter.detach().reshape(-1)[:FIRST_VALUES] for parameter in model.parameters()]
    now["the model"] = _digest([fingerprint([values for values in weights if not values.is_meta])])
    before = folder.once("contents", lambda: now)
    for what, digest in now.items():
        if before.get(what) != digest:
            raise StorageError(
                f"{what} is not what it was in the first run of {str(folder.folder.parent)!r}; expected the same to "
                "resume: put it back, or choose another --output"
            )


def _digest(parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def _told(example: Example) -> tuple[object, ...]:
    pictures = [_picture(one) for one in (example.image, *example.others)]
    return (example.prompt, example.answer, example.group, example.choices, example.pair, example.worth, pictures)


def _picture(picture: Any) -> tuple[object, ...]:
    """What tells a picture from another; opening thousands of files to look would take longer than a search may."""
    if isinstance(picture, Path):
        return picture.name, _size(picture)
    if isinstance(picture, ArrowImage):
        return picture.file.name, _size(picture.file), picture.row
    content = picture if isinstance(picture, bytes) else picture.tobytes() if hasattr(picture, "tobytes") else b""
    return type(picture).__name__, hashlib.sha256(content).hexdigest()


def _size(file: Path) -> int | None:
    """None where there is no such file: whoever opens it says what is wrong."""
    try:
        return file.stat().st_size
    except OSError:
        return None
