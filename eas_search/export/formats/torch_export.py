"""`torch-export`: the prefill as a `.pt2` archive for `torch.export.load`, C++ runtimes and AOTInductor.

`torch.export.load` unpickles what an archive stores as pickled tensors or sample inputs. Ours stores raw tensors and
JSON only, and before loading it is checked that an archive does.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from eas_search.exceptions import StorageError
from eas_search.export.formats.base import Writing
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
        """The archive, without the sample inputs that torch would pickle."""
        program, facts = trace(job.merged, job.prompts)
        program.example_inputs = None
        torch.export.save(program, job.folder / ARCHIVE)
        return {"merged": True, **facts}

    def load(self, folder: Path, content: Mapping[str, Any], base: nn.Module | None) -> nn.Module:
        """The program."""
        check_archive(folder / ARCHIVE)
        run = torch.export.load(folder / ARCHIVE).module()
        return Graph(lambda values: run(*values), content)


def check_archive(path: Path) -> None:
    """Refuse an archive that stores anything as a pickle.

    Raises:
        StorageError: it does, or it is no archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            pickled = [
                entry.filename for entry in archive.infolist() if entry.filename.endswith(".pt") and entry.file_size
            ]
            configs = [
                name for name in archive.namelist() if name.endswith(("weights_config.json", "constants_config.json"))
            ]
            for name in configs:
                entries = json.loads(archive.read(name))["config"]
                pickled += [f"{name}: {key}" for key, entry in entries.items() if entry.get("use_pickle") is not False]
            wrapped = [name for name in archive.namelist() if "/constants/" in name and not name.endswith(".json")]
            pickled += [name for name in wrapped if not Path(name).name.startswith("tensor_")]
    except (OSError, zipfile.BadZipFile, ValueError, KeyError, AttributeError) as error:
        raise StorageError(f"{str(path)!r} is no readable archive of torch.export ({error}); export again") from error
    if pickled or len(configs) < 2:
        what = pickled[0] if pickled else "no list of its weights"
        raise StorageError(
            f"{str(path)!r} holds {what}, which loading would unpickle; expected raw tensors only: do not load it"
        )
