"""The workbench of a search: the model, its searchable sites and the encoded samples, loaded once per process."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite, attention_sites, prove_sites
from eas_search.exceptions import ConfigError
from eas_search.latency import QuietLock
from eas_search.models.loading import load_model
from eas_search.search_space import SearchSpace
from eas_search.settings import SearchSettings
from eas_search.tasks import Split, get_task
from eas_search.training import on_device


@dataclass
class Workbench:
    """What every stage of a search works on.

    Attributes:
        settings: of the search.
        model: the original model, frozen, in eval mode.
        processor: its tokenizer and image processor.
        sites: the searchable attention sites.
        splits: encoded samples by split name.
        quiet: keeps other workers still while something is timed.
    """

    settings: SearchSettings
    model: nn.Module
    processor: Any
    sites: tuple[AttentionSite, ...]
    splits: dict[Split, Any]
    quiet: QuietLock

    @classmethod
    def open(cls, settings: SearchSettings, folder: Path | None = None) -> Workbench:
        """Load model and samples and prove the sites.

        Args:
            settings: of the search.
            folder: shared by the workers of one search; None when there is only one process.

        Raises:
            EasSearchError: whatever is wrong with the model, the task, its data or the search space.
        """
        task = get_task(settings.task, settings.data)
        model, processor = load_model(settings.model, settings.device, settings.dtype)
        model.requires_grad_(False)
        every = tuple(attention_sites(model))
        sites = tuple(site for site in every if site.tower in settings.space.towers)
        if not sites:
            raise ConfigError(
                f"space.towers is {list(settings.space.towers)}, but the model only has "
                f"{sorted({site.tower for site in every})}; choose one of these"
            )
        limits = settings.samples
        wanted: dict[Split, int | None] = {
            "train": limits.train,
            "validation": limits.validation,
            "test": limits.test,
        }
        splits = {name: task.encode(processor, task.examples(name, limit)) for name, limit in wanted.items()}
        lock = None if folder is None or settings.jobs == 1 else folder / "quiet.lock"
        bench = cls(settings, model, processor, sites, splits, QuietLock(lock))
        probe = on_device(next(iter(splits["validation"].batches(4))), model)
        prove_sites(model, every, probe, tolerance=1e-5 if settings.dtype == "float32" else 5e-2)
        return bench

    @property
    def space(self) -> SearchSpace:
        """The search space over the searchable sites."""
        return SearchSpace(self.sites, self.settings.space, self.settings.student)

    @property
    def guard(self) -> Callable[[], AbstractContextManager[None]]:
        """Entered around every unit of normal work."""
        return self.quiet.shared

    def latency_inputs(self) -> dict[str, Tensor]:
        """The batch of prompts on which latency is measured."""
        prompts = self.splits["validation"].prompts(self.settings.latency_batch)
        return on_device(prompts, self.model)

    @property
    def hardware(self) -> dict[str, Any]:
        """Where the figures were measured."""
        import os
        import platform

        device = next(self.model.parameters()).device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
        return {
            "device": str(device),
            "name": name,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        }


def _cpu_name() -> str:
    import platform

    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
