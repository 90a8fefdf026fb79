"""The manifest of an export: SHA-256 of every file, checked before anything is read.

safetensors has no checksum of its own, so a flipped bit would load silently.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from eas_search.exceptions import VerificationError
from eas_search.export.files import CARD, EAS_CONFIG, MANIFEST, read_json, write_json


def write_manifest(folder: Path) -> None:
    """SHA-256 of every file of the export."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    write_json(folder / MANIFEST, {"sha256": {path.name: _sha256(path) for path in files}})


def clear(folder: Path) -> None:
    """Remove the files of an earlier export, which the manifest names; anything else in the folder stays."""
    if (folder / MANIFEST).is_file():
        digests = read_json(folder, MANIFEST).get("sha256")
        for name in digests if isinstance(digests, dict) else ():
            if _is_plain(name):
                (folder / name).unlink(missing_ok=True)
        (folder / MANIFEST).unlink()


def check_manifest(folder: Path, needed: frozenset[str] = frozenset()) -> None:
    """Compare every file with the manifest.

    Args:
        folder: of the export.
        needed: names that the manifest must cover beside `eas_config.json`.

    Raises:
        VerificationError: a file is missing or changed.
        StorageError: there is no readable manifest.
    """
    digests = read_json(folder, MANIFEST).get("sha256")
    if not isinstance(digests, dict) or not {EAS_CONFIG, *needed} <= set(digests):
        raise VerificationError(f"manifest of {str(folder)!r} does not cover the weights; export again")
    for name, digest in digests.items():
        if not _is_plain(name):
            raise VerificationError(
                f"manifest of {str(folder)!r} names {name!r}; expected plain file names: do not load it"
            )
        path = folder / name
        if not path.is_file():
            raise VerificationError(
                f"{name} is missing from {str(folder)!r}; expected it by the manifest: export again"
            )
        if name != CARD and _sha256(path) != digest:
            raise VerificationError(
                f"{name} in {str(folder)!r} is not what was exported (SHA-256 differs); copy it again or export again"
            )


def _is_plain(name: str) -> bool:
    return bool(name) and "/" not in name and "\\" not in name and not name.startswith(".")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
