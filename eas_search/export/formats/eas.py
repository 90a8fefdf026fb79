"""`eas`: the merged student in a folder of our own, the fast one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import transformers
from torch import nn

from eas_search.export.files import student_info
from eas_search.export.formats.base import Format, Verdict, Writing
from eas_search.export.student import KIND, load_pretrained, write_student
from eas_search.models.own import own_class


class EasFormat(Format):
    """Every student fits: the loader rebuilds its structure."""

    name: ClassVar[str] = KIND
    summary: ClassVar[str] = "our loader, or AutoModel with eas_search imported; fast"
    usage: ClassVar[str] = 'import eas_search as eas\n\nmodel = eas.load_pretrained("path/to/this/folder")'

    def plan(self, student: Any) -> Verdict:
        """See the class."""
        cls = type(student)
        ours = own_class(getattr(student.config, "model_type", None), cls.__name__)
        if cls not in (ours, getattr(transformers, cls.__name__, None)):
            return Verdict("impossible", f"{cls.__name__} is not a class of transformers; adapter would fit")
        if getattr(student, "is_quantized", False):
            return Verdict("impossible", "the weights are quantised; adapter would fit")
        return Verdict("exact", "skipped attentions are not computed, adapters are merged")

    def write(self, job: Writing) -> dict[str, Any]:
        """Base configuration and weights of the merged student."""
        write_student(job.merged, job.folder)
        return {"merged": True, "thin": list(student_info(job.merged).thin)}

    def load(self, folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
        """The merged student."""
        return load_pretrained(folder)
