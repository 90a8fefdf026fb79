"""What trials have trained, on disk: the race before the finals goes on with it instead of training it again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters
from eas_search.stage_folder import StageFolder


@dataclass(frozen=True)
class KeptAdapters:
    """Adapters of finished trials by configuration, shared by the processes of one search.

    They are those of a search's one supernet and one way of fine-tuning, which its output folder is bound to.

    Attributes:
        folder: where they are; None keeps nothing.
        limit: bytes that they may take on disk. What no longer fits is not kept; whoever wants it trains it again.
    """

    folder: Path | None = None
    limit: int = 0

    def keep(self, config: SkipConfig, student: nn.Module) -> bool:
        """Keep the adapters of this configuration's student; whether they fitted."""
        if self.folder is None:
            return False
        tensors = {name: parameter.detach() for name, parameter in adapter_parameters(student).items()}
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.limit - self.held():
            return False
        StageFolder(self.folder).write(config.digest, {"config": config.model_dump(mode="json")}, tensors)
        return True

    def read(self, config: SkipConfig) -> dict[str, Tensor] | None:
        """The kept adapters of a configuration, or None.

        Raises:
            StorageError: the files are there but damaged.
        """
        kept = None if self.folder is None else StageFolder(self.folder).read(config.digest)
        return None if kept is None else kept[1]

    def held(self) -> int:
        """Bytes that the kept adapters take."""
        if self.folder is None or not self.folder.is_dir():
            return 0
        return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
