"""What every export says of itself, in `eas_config.json`, and where it may be written."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import eas_search
from eas_search.exceptions import ConfigError, StorageError
from eas_search.full_disk import full_disk_explained

# Of the folder; 1 had the base model's own config.json, so that transformers filled in what is not there, and 2 pooled
# terms as biases of the FFN.
FORMAT = 3
CONFIG, EAS_CONFIG = "config.json", "eas_config.json"
MANIFEST, REFERENCE, CARD = "manifest.json", "reference.safetensors", "README.md"


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make `folder`; an operating system's refusal becomes one line.

    Raises:
        StorageError: the folder cannot be written.
    """
    with full_disk_explained(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            yield
        except OSError as error:
            raise StorageError(
                f"export folder {str(folder)!r} cannot be written ({error.strerror or error}); choose another folder"
            ) from error


def check_writable(folder: Path) -> None:
    """Find out whether an export can be written, before hours are spent on what it should hold.

    Raises:
        StorageError: it cannot.
    """
    with writing(folder):
        probe = folder / ".writable"
        probe.write_text("", encoding="utf-8")
        probe.unlink()


def student_info(student: nn.Module) -> Any:
    """`student.eas`.

    Raises:
        ConfigError: not a student.
    """
    info = getattr(student, "eas", None)
    if info is None:
        raise ConfigError("the model is not a student; expected the result of `apply_skips` or `merge`")
    return info


def describe(student: nn.Module, kind: str, about: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Content of `eas_config.json`: what the folder holds (`kind`) and how its student was made."""
    info = student_info(student)
    return {
        "format": FORMAT,
        "kind": kind,
        "eas_search": eas_search.__version__,
        "architecture": type(student).__name__,
        "options": constructor_options(student),
        "merged": info.merged,
        "thin": list(info.thin),
        "dtype": str(_main_dtype(student)).removeprefix("torch."),
        "skip_config": info.config.model_copy(update={"skip": tuple(s.name for s in info.skipped)}).model_dump(
            mode="json"
        ),
        "about": dict(about or {}),
    }


def _main_dtype(student: nn.Module) -> torch.dtype:
    """The dtype of most weights; single ones may have been kept in another."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in student.parameters():
        sizes[weight.dtype] += weight.numel() * weight.is_floating_point()
    return sizes.most_common(1)[0][0]


def constructor_options(student: nn.Module) -> dict[str, bool]:
    """What a model was built with and its configuration does not say: an encoder may be without its pooler."""
    optional = "add_pooling_layer" in inspect.signature(type(student).__init__).parameters
    return {"add_pooling_layer": False} if optional and getattr(student, "pooler", None) is None else {}


def read_content(folder: Path) -> dict[str, Any]:
    """What an export says of itself, from `eas_config.json`.

    Raises:
        StorageError: not an export, or one of another format of this package.
    """
    content = read_json(folder, EAS_CONFIG)
    found = content.get("format")
    if found != FORMAT:
        older = isinstance(found, int) and found < FORMAT
        cure = "export it again from its search with `eas-search export`" if older else "update eas_search"
        raise StorageError(f"export {str(folder)!r} has folder format {found!r}; expected {FORMAT}: {cure}")
    if not isinstance(content.get("kind"), str) or not isinstance(content.get("skip_config"), dict):
        raise StorageError(f"{EAS_CONFIG} in {str(folder)!r} names no kind or skip configuration; export again")
    return content


def about(folder: str | Path) -> dict[str, Any]:
    """What an export says of itself: base model, task, claims, conditions."""
    return read_json(Path(folder), EAS_CONFIG).get("about", {})


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Inverse of `write_json`.

    Raises:
        StorageError: missing or malformed.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} instead of names and values")
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{str(folder)!r} has no readable {name}; expected a folder written by `eas-search export`"
        ) from error
    return content
