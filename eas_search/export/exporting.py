"""Writing a trained student in a format, and verifying what was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.export.files import CARD, EAS_CONFIG, describe, student_info, write_json, writing
from eas_search.export.formats import FORMATS, Format, Verdict, Writing
from eas_search.export.manifest import clear, write_manifest
from eas_search.export.reference import record, save_reference
from eas_search.export.verification import ExportReport, verify
from eas_search.merging import merge


@dataclass(frozen=True)
class ExportJob:
    """What goes into an export.

    Attributes:
        student: trained, unmerged.
        prompts: a few inputs (several rows, best of different lengths) whose answers are recorded.
        processor: saved beside the model when given.
        card: text of README.md, without the part that says how to load.
        about: JSON-able facts (base model, task, claims), kept in `eas_config.json`.
        base: the original model, so that adapters can be verified without loading it again.
    """

    student: nn.Module
    prompts: Mapping[str, Tensor]
    processor: Any = None
    card: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    base: nn.Module | None = None


def get_format(name: str) -> Format:
    """The format called `name`.

    Raises:
        ConfigError: there is none.
    """
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is unknown; expected one of {', '.join(FORMATS)}: choose one of these")
    return FORMATS[name]


def usage(kind: Format, student: nn.Module, prompts: Mapping[str, Tensor]) -> str:
    """Python that loads an export of this student."""
    names = ", ".join(prompts)
    return kind.usage.replace("{architecture}", type(student).__name__).replace("{inputs}", names)


def plan_formats(student: nn.Module) -> dict[str, Verdict]:
    """For every format whether this student can be written in it; nothing needs to be trained, nor even loaded."""
    _check_unmerged(student)
    return {name: kind.plan(student) for name, kind in FORMATS.items()}


def check_possible(kind: Format, student: nn.Module) -> None:
    """Raises UnsupportedModelError when this student cannot be written in this format."""
    verdict = kind.plan(student)
    if verdict.kind == "impossible":
        raise UnsupportedModelError(
            f"format {kind.name!r} is impossible for this configuration: {verdict.reason}; expected another format: "
            "see `eas-search export RUN --plan`"
        )


def export_student(job: ExportJob, folder: str | Path, kind: str = "eas") -> ExportReport:
    """Write a trained student in a format, with its recorded answers, and verify what was written.

    Raises:
        UnsupportedModelError: impossible in this format.
        StorageError: the folder cannot be written.
        VerificationError: what was written does not answer like the student.
    """
    chosen, folder = get_format(kind), Path(folder)
    _check_unmerged(job.student)
    check_possible(chosen, job.student)
    reference, merged = record(job.student, job.prompts), merge(job.student).eval()
    with writing(folder):
        clear(folder)
        if job.processor is not None:
            job.processor.save_pretrained(folder)
        if job.card is not None:
            (folder / CARD).write_text(job.card, encoding="utf-8")
        more = chosen.write(Writing(job.student, merged, folder, reference.inputs, job.about.get("base_model")))
        write_json(folder / EAS_CONFIG, {**describe(job.student, kind, job.about), **more})
        save_reference(folder, reference)
        write_manifest(folder)
    return verify(folder, base=job.base)


def _check_unmerged(student: nn.Module) -> None:
    if student_info(student).merged:
        raise ConfigError("the student is merged; expected the trained one, unmerged: its answers are the reference")
