"""`stock`: the student as a plain class of `transformers`, which loads with nothing of ours installed.

The attention of a skipped block is there with zero weights, so it adds nothing but is still computed. Its FFN is the
merged one: norm2 gets gain 1 and shift 0, so that the FFN reads the bare normalised tokens that it was folded for. A
wider FFN (placement `parallel`) makes all FFNs of the tower as wide, with neurons of weight zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import nn

from eas_search.export.formats.base import Format, Verdict, Writing
from eas_search.export.formats.plain import Misfit, sizes_only
from eas_search.export.formats.plain_model import build
from eas_search.export.student import model_options


class StockFormat(Format):
    """Exact where ordinary weights can hold the student; never faster."""

    name: ClassVar[str] = "stock"
    summary: ClassVar[str] = "a plain class of transformers, nothing of ours needed; not faster"
    library: ClassVar[str] = "transformers"
    usage: ClassVar[str] = (
        "from transformers import {architecture}\n\n"
        'model = {architecture}.from_pretrained("path/to/this/folder")\n'
        "# The skipped attentions are computed with zero weights: for speed, export the format `eas`."
    )

    def plan(self, student: Any) -> Verdict:
        """See the class."""
        try:
            build(*sizes_only(student))
        except Misfit as misfit:
            return Verdict("impossible", str(misfit))
        return Verdict("exact", "not faster: the skipped attentions are computed with zero weights")

    def write(self, job: Writing) -> dict[str, Any]:
        """As any model of `transformers` is saved."""
        build(job.student, job.merged).save_pretrained(job.folder)
        return {"merged": True}

    def load(self, folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
        """As any model of `transformers` is loaded."""
        cls: Any = getattr(transformers, content["architecture"])
        return cls.from_pretrained(folder, dtype=getattr(torch, content["dtype"]), **model_options(content)).eval()
