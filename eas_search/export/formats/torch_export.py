"""`torch-export`: the prefill as a `.pt2` archive for `torch.export.load`, C++ runtimes and AOTInductor.

`torch.export.load` runs what an archive brings along as pickles, compiled libraries or expressions. Ours holds raw
tensors and JSON only, and before loading it is checked that an archive does; see `pt2_archive`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from eas_search.exceptions import StorageError, UnsupportedModelError
from eas_search.export.formats.base import Writing
from eas_search.export.formats.pt2_archive import check_archive, first_refused
from eas_search.export.formats.tracing import Graph, GraphFormat, trace

ARCHIVE = "model.pt2"


class TorchExportFormat(GraphFormat):
    """The graph in torch's own archive."""

    name: ClassVar[str] = "torch-export"
    summary: ClassVar[str] = "the prefill as one graph for torch's runtimes (.pt2)"
    library: ClassVar[str] = "pytorch"
    usage: ClassVar[str] = (
        "import torch\n\n"
        'run = torch.export.load("path/to/this/folder/model.pt2").module()\n'
        "logits, *_ = run({inputs})  # tensors in this order; prefill only"
    )

    def write(self, job: Writing) -> dict[str, Any]:
        """The archive, without the sample inputs that torch would pickle.

        Raises:
            UnsupportedModelError: the model cannot be traced, or only to a graph that would not be loaded again.
        """
        program, facts = trace(job.merged, job.prompts)
        program.example_inputs = None
        program._guards_code = []  # code, which torch runs on sample inputs only
        torch.export.save(program, job.folder / ARCHIVE)
        if (refused := first_refused(job.folder / ARCHIVE)) is not None:
            raise UnsupportedModelError(f"the archive of {type(job.merged).__name__} {refused}: choose another format")
        return {"merged": True, **facts}

    def load(self, folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
        """The program.

        Raises:
            StorageError: the archive would run something else than tensor operators, or torch cannot read it.
        """
        check_archive(folder / ARCHIVE)
        try:
            run = torch.export.load(folder / ARCHIVE).module()
        except Exception as error:  # reading a damaged graph fails in any way
            reason = " ".join(str(error).split())[:160]
            raise StorageError(
                f"{str(folder / ARCHIVE)!r} cannot be read by torch {torch.__version__} ({type(error).__name__}: "
                f"{reason}); expected what that version writes: export again"
            ) from error
        return Graph(lambda values: run(*values), content)
