"""Saving and loading students: safetensors and JSON only, with a manifest that is checked and a reference to verify.

A saved student is a Hugging Face folder (config, weights, processor, card) plus `eas_config.json`. Its structure
follows from the base configuration and the skip configuration, so loading rebuilds it and fills in the weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

import eas_search
from eas_search.exceptions import ConfigError, StorageError, VerificationError
from eas_search.merging import MergeReport, merge
from eas_search.models.loading import architecture_class, load_config, resolve_device
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

FORMAT = 1
CONFIG, WEIGHTS, EAS_CONFIG = "config.json", "model.safetensors", "eas_config.json"
MANIFEST, REFERENCE = "manifest.json", "reference.safetensors"


def save_pretrained(
    student: nn.Module,
    folder: str | Path,
    processor: Any = None,
    card: str | None = None,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Write a student, merged or not, so that `load_pretrained` gives the same function back.

    Args:
        student: made by `apply_skips`, usually also by `merge`.
        folder: created if needed; files of an earlier export are replaced.
        processor: saved beside it when given.
        card: text of README.md.
        extra: JSON-able facts kept in `eas_config.json` under `about` (base model, task, claims).

    Raises:
        ConfigError: not a student.
        StorageError: the folder cannot be written.
    """
    info = getattr(student, "eas", None)
    if info is None:
        raise ConfigError("the model is not a student; expected the result of `apply_skips` or `merge`")
    folder = Path(folder)
    config: Any = student.config
    try:
        folder.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(folder)
        if getattr(student, "generation_config", None) is not None:
            student.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
        if processor is not None:
            processor.save_pretrained(folder)
        save_model(student, str(folder / WEIGHTS))
        names = tuple(site.name for site in info.skipped)
        content = {
            "format": FORMAT,
            "eas_search": eas_search.__version__,
            "architecture": type(student).__name__,
            "merged": info.merged,
            "dtype": str(next(student.parameters()).dtype).removeprefix("torch."),
            "skip_config": info.config.model_copy(update={"skip": names}).model_dump(mode="json"),
            "about": dict(extra or {}),
        }
        (folder / EAS_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if card is not None:
            (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / REFERENCE).unlink(missing_ok=True)  # of an earlier export, whose answers these weights do not give
        write_manifest(folder)
    except OSError as error:
        raise StorageError(
            f"export folder {str(folder)!r} cannot be written ({error.strerror}); choose another folder"
        ) from error
    return folder


def write_manifest(folder: Path) -> None:
    """SHA-256 of every file of the export; safetensors itself has no checksum."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    digests = {path.name: _sha256(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> None:
    """Compare every file with the manifest.

    Raises:
        VerificationError: a file is missing or changed.
        StorageError: there is no readable manifest.
    """
    digests = _read_json(folder, MANIFEST).get("sha256")
    if not isinstance(digests, dict) or not {WEIGHTS, EAS_CONFIG, CONFIG} <= set(digests):
        raise VerificationError(f"manifest of {str(folder)!r} does not cover the weights; export again")
    for name, digest in digests.items():
        if not name or "/" in name or "\\" in name or name.startswith("."):
            raise VerificationError(
                f"manifest of {str(folder)!r} names {name!r}; expected plain file names: do not load it"
            )
        path = folder / name
        if not path.is_file():
            raise VerificationError(
                f"{name} is missing from {str(folder)!r}; expected it by the manifest: export again"
            )
        if name != "README.md" and _sha256(path) != digest:
            raise VerificationError(
                f"{name} in {str(folder)!r} is not what was exported (SHA-256 differs); copy it again or export again"
            )


def load_pretrained(folder: str | Path, device: str = "cpu") -> nn.Module:
    """The student saved in `folder`, in eval mode, after checking the manifest.

    Raises:
        StorageError: not an export, or one of a newer format.
        VerificationError: a file is not what was exported.
    """
    folder = Path(folder)
    content = _read_json(folder, EAS_CONFIG)
    if content.get("format") != FORMAT:
        raise StorageError(
            f"export {str(folder)!r} has format {content.get('format')!r}; expected {FORMAT}: update eas_search"
        )
    check_manifest(folder)
    student = _empty(folder, content)
    try:
        load_model(student, str(folder / WEIGHTS), strict=True)
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise VerificationError(
            f"weights in {str(folder)!r} do not fit the configuration: {reason}; export again"
        ) from error
    return student.requires_grad_(False).to(resolve_device(device)).eval()


def _empty(folder: Path, content: Mapping[str, Any]) -> Any:
    """The student that an export describes, before its weights are filled in."""
    import transformers
    from transformers.initialization import no_init_weights

    name = str(folder)
    dtype = getattr(torch, str(content.get("dtype")), None)
    if not isinstance(dtype, torch.dtype) or not isinstance(content.get("skip_config"), dict):
        raise StorageError(f"{EAS_CONFIG} in {name!r} names no dtype or skip configuration; export again")
    config = load_config(name, name)
    with no_init_weights():
        base = architecture_class(config, name)._from_config(config, dtype=dtype)
    base.tie_weights()
    if (folder / "generation_config.json").is_file():
        base.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    student = apply_skips(base.eval(), SkipConfig(**content["skip_config"]))
    return merge(student) if content.get("merged") else student


def about(folder: str | Path) -> dict[str, Any]:
    """What an export says of itself: base model, task, claims, conditions."""
    return _read_json(Path(folder), EAS_CONFIG).get("about", {})


@torch.no_grad()
def write_reference(folder: str | Path, student: nn.Module, prompts: Mapping[str, Tensor], new_tokens: int = 4) -> None:
    """Keep what the *unmerged, trained* student answers to a few prompts, for `verify`."""
    inputs = {name: tensor.cpu() for name, tensor in prompts.items()}
    logits, generated = _answers(student, inputs, new_tokens)
    tensors = {f"input.{name}": tensor.contiguous() for name, tensor in inputs.items()}
    save_file({**tensors, "logits": logits.contiguous(), "generated": generated.contiguous()}, Path(folder) / REFERENCE)
    write_manifest(Path(folder))


@dataclass(frozen=True)
class ExportReport:
    """What `verify` found: the largest logit differences, and whether generation agreed token by token."""

    report: MergeReport
    generated_equal: bool


def verify(folder: str | Path, tolerance: float = 1e-4) -> ExportReport:
    """Reload an export and compare it with the recorded answers of the trained student it was made from.

    Compared are the prefill's logits of real (visible) tokens, the same prompts one by one without padding, and greedy
    generation with the KV cache.

    Raises:
        VerificationError: a difference above `tolerance`, or other tokens.
        StorageError: no reference was kept.
    """
    folder = Path(folder)
    model = load_pretrained(folder)
    if not (folder / REFERENCE).is_file():
        raise StorageError(
            f"export {str(folder)!r} has no {REFERENCE}; expected one from `eas-search export`: export again"
        )
    tensors = load_file(folder / REFERENCE)
    inputs = {name.removeprefix("input."): tensor for name, tensor in tensors.items() if name.startswith("input.")}
    new_tokens = tensors["generated"].shape[1] - inputs["input_ids"].shape[1]
    logits, generated = _answers(model, inputs, new_tokens)
    visible = inputs["attention_mask"].bool()
    differences = {"batched": (logits - tensors["logits"])[visible].abs().max().item()}
    singles = []
    for i in range(len(visible)):
        one = {name: tensor[i : i + 1] for name, tensor in inputs.items()}
        keep = visible[i]
        for name in ("input_ids", "attention_mask"):
            one[name] = one[name][:, keep]
        with torch.no_grad():
            alone = model(**one, use_cache=False).logits[0]
        singles.append((alone - tensors["logits"][i, keep]).abs().max().item())
    differences["one by one, unpadded"] = max(singles)
    report = MergeReport(differences, tolerance)
    equal = bool(torch.equal(generated, tensors["generated"]))
    if not report.largest <= tolerance or not equal:
        what = "generated tokens differ" if not equal else f"logits differ by {report.largest:.3g}"
        raise VerificationError(
            f"export {str(folder)!r}: {what}; expected at most {tolerance:g} and equal tokens: export again",
            report,
        )
    return ExportReport(report, equal)


@torch.no_grad()
def _answers(model: Any, inputs: Mapping[str, Tensor], new_tokens: int) -> tuple[Tensor, Tensor]:
    device = next(model.parameters()).device
    moved = {name: tensor.to(device) for name, tensor in inputs.items()}
    logits = model(**moved, use_cache=False).logits
    generated = model.generate(**moved, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False)
    return logits.float().cpu(), generated.cpu()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"{type(content).__name__} instead of names and values")
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{str(folder)!r} has no readable {name}; expected a folder written by `eas-search export`"
        ) from error
    return content
