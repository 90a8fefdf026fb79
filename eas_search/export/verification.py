"""`verify`: reload an export, in whatever format, and compare its answers with those of the trained student."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.exceptions import StorageError, VerificationError
from eas_search.export.files import read_content
from eas_search.export.formats import FORMATS
from eas_search.export.forms import answer, generate
from eas_search.export.manifest import check_manifest
from eas_search.export.reference import Reference, read_reference
from eas_search.merging import MergeReport
from eas_search.models.loading import resolve_device

TOLERANCE = 1e-4  # float32: folded weights round once more per layer
ROUNDINGS = 8  # of a half-precision format, as a share of the largest answer


@dataclass(frozen=True)
class ExportReport:
    """What `verify` found.

    Attributes:
        report: the largest difference per form and output.
        generated_equal: whether every greedy token agreed; None when nothing was generated.
        kind: format of the export.
        left_out: recorded forms in which this format cannot be asked → why.
    """

    report: MergeReport
    generated_equal: bool | None
    kind: str
    left_out: dict[str, str]


def verify(
    folder: str | Path, tolerance: float | None = None, base: nn.Module | None = None, device: str | None = None
) -> ExportReport:
    """Reload an export and compare it with the recorded answers of the trained student it was made from.

    Args:
        folder: of the export.
        tolerance: largest absolute difference allowed; None: 1e-4 for float32, 8 roundings for half precision.
        base: the original model, for formats that hold adapters only; None loads the one that the export names.
        device: where to compare; None: where the answers were recorded, if that is here.

    Raises:
        VerificationError: a difference above `tolerance`, or (in float32) other tokens.
        StorageError: no reference was kept, or the folder cannot be read.
    """
    folder = Path(folder)
    model = load_export(folder, base)
    reference = read_reference(folder)
    return compare(model.to(_device(device, reference)), reference, read_content(folder), tolerance)


def load_export(folder: str | Path, base: nn.Module | None = None) -> nn.Module:
    """What an export of any format holds, after checking its manifest; see `verify` for `base` and errors."""
    folder = Path(folder)
    content = read_content(folder)
    kind = FORMATS.get(content["kind"])
    if kind is None:
        raise StorageError(
            f"export {str(folder)!r} has format {content['kind']!r}; expected one of {', '.join(FORMATS)}: "
            "update eas_search"
        )
    check_manifest(folder)
    return kind.load(folder, content, base)


def _device(wanted: str | None, reference: Reference) -> torch.device:
    if wanted is not None:
        return resolve_device(wanted)
    accelerator = torch.accelerator.current_accelerator()
    return accelerator if accelerator is not None and accelerator.type == reference.device else torch.device("cpu")


def compare(model: Any, reference: Reference, content: dict[str, Any], tolerance: float | None) -> ExportReport:
    """Ask `model` in every recorded form.

    Raises:
        VerificationError: see `verify`.
    """
    kind = FORMATS[content["kind"]]
    half = content.get("dtype") in ("float16", "bfloat16")
    device = next(iter(model.parameters()), torch.empty(0)).device
    differences, left_out, sizes = {}, {}, [1.0]
    for form, expected in reference.answers.items():
        inputs = reference.arranged(form.rows, form, device)
        if (reason := kind.cannot_be_asked(content, form, inputs)) is not None:
            left_out[form.name] = reason
            continue
        found = answer(model, inputs, form, reference.positions)
        for name, wanted in expected.items():
            differences[f"{form.name}: {name}"] = _difference(found.get(name), wanted)
            sizes.append(wanted.abs().max().item())
    unequal = (
        []
        if not kind.generates
        else [
            f"{rows} row{'s' * (rows == 'several')}, {cache} cache"
            for (rows, cache), tokens in reference.generated.items()
            if not torch.equal(
                generate(model, reference.arranged(rows, None, device), reference.new_tokens, cache), tokens
            )
        ]
    )
    equal = None if not (kind.generates and reference.generated) else not unequal
    if tolerance is None:
        eps = torch.finfo(getattr(torch, content["dtype"])).eps if half else 0.0
        tolerance = ROUNDINGS * eps * max(sizes) if half else TOLERANCE
    report = ExportReport(MergeReport(differences, tolerance), equal, content["kind"], left_out)
    _refuse(report, [] if half else unequal)
    return report


def _difference(found: Tensor | None, wanted: Tensor) -> float:
    """Largest absolute difference; NaN when there is nothing to compare or a value is not finite."""
    if found is None or found.shape != wanted.shape or not wanted.numel():
        return float("nan")
    return (found - wanted).abs().max().item()


def _refuse(result: ExportReport, unequal: Sequence[str]) -> None:
    report = result.report
    wrong = [name for name, value in report.differences.items() if not value <= report.tolerance]
    if not report.differences:
        raise VerificationError("the export could not be compared in any recorded form; export again", result)
    if wrong:
        worst = max(wrong, key=lambda name: report.differences[name] if report.differences[name] < 1e38 else 1e38)
        raise VerificationError(
            f"the export's answers differ by {report.differences[worst]:.3g} ({worst}); expected at most "
            f"{report.tolerance:g}: do not use it, export again",
            result,
        )
    if unequal:
        raise VerificationError(
            f"the export's generated tokens differ ({unequal[0]}); expected those of the trained student: do not use "
            "it, export again",
            result,
        )
