"""Whether a `.pt2` archive can be given to `torch.export.load` without running anything that it brings along.

`torch.export.load` unpickles sample inputs, constants, weights and whole archives of an older layout, and runs compiled
libraries and the text of the graph. An archive passes only when each of its entries is one that this package's own
exports have, and holds what theirs hold.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from eas_search.exceptions import StorageError
from eas_search.export.formats.pt2_graph import first_refused_string

_GRAPH = "models/model.json"
_SAMPLES = "data/sample_inputs/model.pt"
_FORMAT, _VERSION = "archive_format", "archive_version"
# (list of the tensors, their folder, what their files are called); other names in these folders are pickles.
_TENSORS = (
    ("data/weights/model_weights_config.json", "data/weights/", re.compile("weight_[0-9]+")),
    ("data/constants/model_constants_config.json", "data/constants/", re.compile("tensor_[0-9]+")),
)
_NEEDED = frozenset({_GRAPH, _SAMPLES, _FORMAT, _VERSION, *(config for config, _, _ in _TENSORS)})
_KNOWN = _NEEDED | {"byteorder", ".data/version", ".data/serialization_id"}
_ROOT = re.compile(r"(?!\.)[^/\\]+")


def check_archive(path: Path) -> None:
    """Refuse an archive that is anything else than one graph of tensor operators with raw tensors.

    Raises:
        StorageError: it is, or it is no archive.
    """
    try:
        refused = first_refused(path)
    # What a damaged or forged archive raises depends on where it is damaged; a nesting too deep is a RuntimeError.
    except (OSError, zipfile.BadZipFile, ValueError, LookupError, AttributeError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise StorageError(f"{str(path)!r} is no readable archive of torch.export ({reason}); export again") from error
    if refused is not None:
        raise StorageError(f"{str(path)!r} {refused}: do not load it")


def first_refused(path: Path) -> str | None:
    """What is wrong with an archive and what was expected, as the end of a sentence about it; None: nothing."""
    return next(chain(_refused_entries(path), _refused_contents(path)), None)


def _refused_entries(path: Path) -> Iterator[str]:
    with zipfile.ZipFile(path) as archive:
        entries = [entry.orig_filename for entry in archive.infolist()]
    root = entries[0].partition("/")[0] if entries else ""
    names = [entry.removeprefix(f"{root}/") for entry in entries]
    for entry, name in zip(entries, names, strict=True):
        if not _ROOT.fullmatch(root) or not entry.startswith(f"{root}/") or not _is_known(name):
            yield f"holds the entry {entry[:80]!r}; expected only what a graph with raw tensors needs"
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        yield f"holds {twice[0]!r} twice; expected every entry once"
    if missing := _NEEDED - set(names):
        yield f"has no {min(missing)!r}; expected a graph, its tensors and their lists"
    # torch finds the directory of a zip file in another way than Python; both must have found the same one.
    if sorted(_reader(path).get_all_records()) != sorted(names):
        yield "has two directories; expected one"


def _refused_contents(path: Path) -> Iterator[str]:
    """Of an archive whose entries are known ones. Everything is read as torch reads it, so that both see the same."""
    reader = _reader(path)
    if (reader.get_record(_FORMAT), reader.get_record(_VERSION)) != (b"pt2", b"0"):
        yield "has another layout; expected version 0 of pt2"
    if reader.get_record_size(_SAMPLES):
        yield "holds sample inputs, which loading would unpickle; expected none"
    records = set(reader.get_all_records())
    for config, folder, pattern in _TENSORS:
        content = _json(reader, config)
        for name, tensor in content["config"].items():
            if tensor["use_pickle"] is not False:
                yield f"holds {name[:80]!r}, which loading would unpickle; expected raw tensors only"
            file = tensor["path_name"]
            if not pattern.fullmatch(file) or f"{folder}{file}" not in records:
                yield f"keeps {name[:80]!r} in {file[:80]!r}; expected raw tensors among its entries"
        if (what := first_refused_string(content)) is not None:
            yield f"has the {what} in {config}; expected descriptions of raw tensors"
    if (what := first_refused_string(_json(reader, _GRAPH))) is not None:
        yield f"has the {what} in its graph; expected operators of aten on tensors and sizes"


def _is_known(name: str) -> bool:
    return name in _KNOWN or any(
        name.startswith(folder) and pattern.fullmatch(name.removeprefix(folder)) for _, folder, pattern in _TENSORS
    )


def _reader(path: Path) -> Any:
    return torch._C.PyTorchFileReader(str(path))


def _json(reader: Any, name: str) -> Any:
    return json.loads(reader.get_record(name).decode())
