"""What the *unmerged, trained* student answers to a few prompts: the proof that an export carries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eas_search.conditions import device_of
from eas_search.exceptions import StorageError
from eas_search.export.files import REFERENCE
from eas_search.export.forms import CacheKind, Form, Inputs, Rows, answer, arrange, cache_kinds, forms_of, generate
from eas_search.export.manifest import write_manifest

ELEMENTS = 2**24  # kept at most, 64 MB: a large vocabulary leaves room for fewer positions
GENERATED: tuple[Rows, ...] = ("one", "several")


@dataclass
class Reference:
    """Recorded answers.

    Attributes:
        inputs: the prompts, on the CPU.
        answers: by form, then by output.
        generated: greedy tokens by (rows, cache).
        positions: tokens per row of which answers were kept.
        new_tokens: how many were generated.
        pad: padding token.
        device: type of the device on which they were recorded.
    """

    inputs: Inputs
    answers: dict[Form, dict[str, Tensor]] = field(default_factory=dict)
    generated: dict[tuple[Rows, CacheKind], Tensor] = field(default_factory=dict)
    positions: int = 1
    new_tokens: int = 0
    pad: int = 0
    device: str = "cpu"

    def arranged(self, rows: Rows, form: Form | None, device: Any) -> Inputs:
        """The prompts in a form (None: as `generate` wants them), on a device."""
        padding = form.padding if form is not None else ("none" if rows == "one" else "left")
        inputs = arrange(self.inputs, rows, padding, self.pad)
        assert inputs is not None, "only forms that these inputs can take are recorded"
        return {name: tensor.to(device) for name, tensor in inputs.items()}


def record(student: Any, prompts: Mapping[str, Tensor], new_tokens: int = 4) -> Reference:
    """Ask a student in every form that it knows.

    Args:
        student: unmerged, in eval mode.
        prompts: keyword arguments of `forward`; an encoder-decoder gets its start token when there is no decoder input.
        new_tokens: greedy tokens to record, where the student generates.
    """
    device = device_of(student)
    inputs = {name: tensor.cpu().contiguous() for name, tensor in prompts.items()}
    config = student.config
    reference = Reference(inputs, new_tokens=new_tokens, pad=_pad_token(config), device=device.type)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs:
        start = student.generation_config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.full((len(next(iter(inputs.values()))), 1), start)
    forms = forms_of(student, inputs)
    probe = answer(
        student, reference.arranged("one" if forms[0].rows == "one" else "several", forms[0], device), forms[0], 1
    )
    width = max(tensor.shape[-1] for tensor in probe.values())
    reference.positions = max(1, ELEMENTS // (width * len(forms) * len(next(iter(inputs.values())))))
    for form in forms:
        reference.answers[form] = answer(
            student, reference.arranged(form.rows, form, device), form, reference.positions
        )
    if student.can_generate():
        for rows, cache in generations(student, inputs):
            asked = reference.arranged(rows, None, device)
            reference.generated[rows, cache] = generate(student, asked, new_tokens, cache)
    return reference


def generations(model: Any, inputs: Inputs) -> list[tuple[Rows, CacheKind]]:
    """(rows, cache) with which a model is asked to generate."""
    caches: list[CacheKind] = cache_kinds(model, inputs)[1:] or ["dynamic"]
    return [(rows, cache) for rows in GENERATED for cache in caches if arrange(inputs, rows, "left", 0) is not None]


def _pad_token(config: Any) -> int:
    token = getattr(config.get_text_config(), "pad_token_id", None)
    return 0 if token is None else int(token)


def write_reference(folder: str | Path, student: nn.Module, prompts: Mapping[str, Tensor], new_tokens: int = 4) -> None:
    """Record what the unmerged student answers, for `verify`, beside an export of it."""
    save_reference(Path(folder), record(student, prompts, new_tokens))
    write_manifest(Path(folder))


def save_reference(folder: Path, reference: Reference) -> None:
    """Write `reference.safetensors`."""
    tensors = {f"input/{name}": tensor for name, tensor in reference.inputs.items()}
    for form, outputs in reference.answers.items():
        key = f"answer/{form.rows}/{form.padding}/{form.cache}"
        tensors |= {f"{key}/{name}": tensor.clone() for name, tensor in outputs.items()}
    for (rows, cache), generated in reference.generated.items():
        tensors[f"generated/{rows}/{cache}"] = generated.contiguous()
    facts = {name: getattr(reference, name) for name in ("positions", "new_tokens", "pad", "device")}
    save_file(tensors, folder / REFERENCE, metadata={"reference": json.dumps(facts)})


def read_reference(folder: Path) -> Reference:
    """Inverse of `save_reference`.

    Raises:
        StorageError: none was kept, or it is unreadable.
    """
    if not (folder / REFERENCE).is_file():
        raise StorageError(
            f"export {str(folder)!r} has no {REFERENCE}; expected one from `eas-search export`: export again"
        )
    try:
        with safe_open(folder / REFERENCE, framework="pt") as file:
            facts = json.loads(file.metadata()["reference"])
            reference = Reference({}, **facts)
            for key in file.keys():  # noqa: SIM118  (not a dict)
                kind, *parts = key.split("/")
                if kind == "input":
                    reference.inputs[parts[0]] = file.get_tensor(key)
                elif kind == "answer":
                    rows, padding, cache, name = parts
                    form: Any = Form(rows, padding, cache)
                    reference.answers.setdefault(form, {})[name] = file.get_tensor(key)
                else:
                    where: Any = tuple(parts)
                    reference.generated[where] = file.get_tensor(key)
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise StorageError(f"{REFERENCE} in {str(folder)!r} cannot be read ({error}); export again") from error
    return reference
