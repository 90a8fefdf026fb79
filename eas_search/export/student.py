"""A student as a folder of its own: safetensors and JSON, from which the same function is rebuilt.

Its structure follows from the base configuration and the skip configuration, so loading rebuilds it and fills in the
weights. `config.json` names a model type of its own with the base configuration inside, and the weights have a file
name of their own: `transformers` alone refuses the folder instead of filling in the missing attentions at random.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import nn

from eas_search.auto_classes import MODEL_TYPE
from eas_search.exceptions import StorageError, VerificationError
from eas_search.export.files import (
    CARD,
    CONFIG,
    EAS_CONFIG,
    describe,
    read_content,
    read_json,
    student_info,
    write_json,
    writing,
)
from eas_search.export.manifest import check_manifest, clear, write_manifest
from eas_search.merging import merge
from eas_search.models.loading import architecture_class, resolve_device
from eas_search.models.own import register_own
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

KIND, WEIGHTS = "eas", "student.safetensors"


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
    student_info(student)
    folder = Path(folder)
    with writing(folder):
        clear(folder)
        if processor is not None:
            processor.save_pretrained(folder)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")
        write_student(student, folder)
        write_json(folder / EAS_CONFIG, describe(student, KIND, extra))
        write_manifest(folder)
    return folder


def write_student(student: nn.Module, folder: Path) -> None:
    """Configuration and weights."""
    config: Any = student.config
    base = {**config.to_dict(), "architectures": [type(student).__name__]}
    write_json(folder / CONFIG, {"model_type": MODEL_TYPE, "architectures": base["architectures"], "base_config": base})
    if getattr(student, "generation_config", None) is not None:
        student.generation_config.save_pretrained(folder)  # type: ignore[union-attr, operator]
    save_model(student, str(folder / WEIGHTS))


def load_pretrained(folder: str | Path, device: str = "cpu", dtype: torch.dtype | None = None) -> nn.Module:
    """The student saved in `folder`, in eval mode, after checking the manifest.

    Args:
        folder: of the export.
        device: where it goes.
        dtype: of its weights; None: as they were saved. What `transformers` keeps in float32 when it loads the base
            model with this dtype (tables of positions such as `inv_freq`, modules that the class names) stays so, and
            so do adapters that are not merged.

    Raises:
        StorageError: not an export, one of another folder format, or not of a kind that this function loads.
        VerificationError: a file is not what was exported.
    """
    folder = Path(folder)
    content = read_content(folder)
    if content["kind"] != KIND:
        raise StorageError(
            f"export {str(folder)!r} has format {content['kind']!r}; expected {KIND!r}: load it as its {CARD} says"
        )
    check_manifest(folder, frozenset({WEIGHTS, CONFIG}))
    student = _empty(folder, content, dtype)
    try:
        load_model(student, str(folder / WEIGHTS), strict=True)
    except (RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise VerificationError(
            f"weights in {str(folder)!r} do not fit the configuration: {reason}; export again"
        ) from error
    return student.requires_grad_(False).to(resolve_device(device)).eval()


def _empty(folder: Path, content: Mapping[str, Any], dtype: torch.dtype | None = None) -> Any:
    """The student that an export describes, before its weights are filled in.

    It is built in its dtype and never cast: casting a module would round its tables of positions too.
    """
    import transformers
    from transformers.initialization import no_init_weights

    saved = getattr(torch, str(content.get("dtype")), None)
    if not isinstance(saved, torch.dtype):
        raise StorageError(f"{EAS_CONFIG} in {str(folder)!r} names no dtype; export again")
    config, dtype = base_config(folder), dtype or saved
    with no_init_weights():
        base = architecture_class(config, str(folder))._from_config(config, dtype=dtype, **model_options(content))
    base.tie_weights()
    keep_dtypes(base, dtype)
    fill_with_noise(base)
    if (folder / "generation_config.json").is_file():
        base.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    student = apply_skips(base.eval(), SkipConfig(**content["skip_config"]))
    return merge(student, tuple(content.get("thin", ()))) if content.get("merged") else student


def model_options(content: Mapping[str, Any]) -> dict[str, bool]:
    """See `constructor_options`; nothing else from a file reaches a constructor."""
    options = content.get("options")
    return {"add_pooling_layer": False} if isinstance(options, dict) and "add_pooling_layer" in options else {}


def keep_dtypes(base: Any, dtype: torch.dtype) -> None:
    """Give the weights that `from_pretrained` keeps in another precision than `dtype` that precision, in place.

    A class names them, as patterns, for float16 alone (`_keep_in_fp32_modules`) or for bfloat16 as well
    (`_keep_in_fp32_modules_strict`).
    """
    plan = [(re.compile(name.replace("*", ".*")), kept) for name, kept in base._get_dtype_plan(dtype).items()]
    saved = base.state_dict().keys() if plan else ()
    for name, tensor in chain(base.named_parameters(), base.named_buffers()):
        kept = next((kept for pattern, kept in plan if pattern.search(name)), None)
        if kept is not None and name in saved and tensor.is_floating_point():
            tensor.data = tensor.data.to(kept)


@torch.no_grad()
def fill_with_noise(model: nn.Module) -> None:
    """Ordinary numbers instead of whatever the memory holds: what a block computes is found out by running it.

    One short vector over and over: drawing every weight of a large model would take minutes.
    """
    noise = torch.randn(65537, generator=torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        matrix = parameter.dim() > 1
        values = (noise * parameter.shape[-1] ** -0.5 if matrix else 1 + 0.1 * noise).to(parameter.dtype)
        for part in parameter.data.view(-1).split(len(values)):
            part.copy_(values[: len(part)])


def base_config(folder: Path) -> Any:
    """Configuration of the base model, as nested in `config.json`; only classes of `transformers` are built.

    Raises:
        StorageError: there is none, or not one that this version of `transformers` knows.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = read_json(folder, CONFIG).get("base_config")
    register_own(values.get("model_type") if isinstance(values, dict) else None)
    if not isinstance(values, dict) or values.get("model_type") not in CONFIG_MAPPING:
        kind = values.get("model_type") if isinstance(values, dict) else None
        raise StorageError(
            f"{CONFIG} in {str(folder)!r} holds no base configuration of a known type (model_type {kind!r}); expected "
            "one of transformers: export again"
        )
    try:
        return CONFIG_MAPPING[values["model_type"]].from_dict({k: v for k, v in values.items() if k != "auto_map"})
    except Exception as error:  # a value of the wrong type raises what the class of the model happens to raise
        reason = " ".join(str(error).split())[:200]
        raise StorageError(
            f"{CONFIG} in {str(folder)!r} cannot be read: {type(error).__name__} {reason}; export again"
        ) from error
