"""The workbench of a search: the model, its searchable sites and the encoded samples, loaded once per process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite, attention_sites, prove_sites
from eas_search.asked_proof import labels_suffice, prove_last_logits
from eas_search.conditions import AS_IT_IS, Conditions, computes_in_bf16, device_of
from eas_search.cost_book import CostBook
from eas_search.exceptions import ConfigError, UnsupportedModelError
from eas_search.kept_adapters import KeptAdapters
from eas_search.latency import QuietLock
from eas_search.latency.predictor import LatencyPredictor
from eas_search.latency.terms import SiteClasses, ends_of_stacks, site_classes, terms_of
from eas_search.models.loading import load_config, load_model, model_location
from eas_search.models.options import LoadOptions
from eas_search.origin import bind_contents
from eas_search.plain_attention import all_short
from eas_search.proof import refuse_unsound
from eas_search.reuse import Caches, attach_caches
from eas_search.search_space import SearchSpace
from eas_search.setting_groups import SpaceSettings
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.stage_folder import StageFolder
from eas_search.tasks import Task, get_task
from eas_search.tasks.splits import divided
from eas_search.training import on_device


@dataclass
class Workbench:
    """What every stage of a search works on.

    Attributes:
        settings: of the search.
        task: on which models are judged.
        model: the original model, frozen, in eval mode.
        processor: its tokenizer and image processor.
        every: all attention sites of the model.
        space: the searchable ones and the choices at them.
        splits: encoded samples by role: train, validation (what the search sees), selection, test (held out).
        quiet: keeps other workers still while something is timed.
        refused: sites that were left out of the space because they cannot be deleted, and why.
        predictor: of the latency of the timed batch, once `predictor_stage` has fitted it.
        costs: FLOPs and KV bytes of the blocks that were measured before.
        kept: adapters of finished trials.
        conditions: under which students are trained, and scored where the score only serves the search.
    """

    settings: SearchSettings
    task: Task
    model: nn.Module
    processor: Any
    every: tuple[AttentionSite, ...]
    space: SearchSpace
    splits: dict[str, Any]
    quiet: QuietLock
    refused: dict[str, str] = field(default_factory=dict)
    predictor: LatencyPredictor | None = None
    costs: CostBook = field(default_factory=CostBook)
    kept: KeptAdapters = field(default_factory=KeptAdapters)
    conditions: Conditions = AS_IT_IS

    @classmethod
    def open(cls, settings: SearchSettings, folder: Path | None = None) -> Workbench:
        """Load model and samples and prove the sites.

        Args:
            settings: of the search.
            folder: the output folder, which the processes of one search share; None where there is none.

        Raises:
            EasSearchError: whatever is wrong with the model, the task, its data or the search space.
        """
        task = get_task(settings.task, settings.data, settings.task_options)
        model, processor = load_for_task(task, settings.model, settings.loading)
        model.requires_grad_(False)
        every = tuple(attention_sites(model))
        space = searched_space(settings, task, every)
        limits = settings.samples
        wanted = (limits.validation, limits.selection)
        both = None if None in wanted else sum(size or 0 for size in wanted)
        search, selection, note = divided(task.examples("validation", both), *wanted)
        task.notes += [note] if note else []
        examples = {
            "train": task.examples("train", limits.train),
            "validation": search,
            "selection": selection,
            "test": task.examples("test", limits.test),
        }
        if folder is not None:
            bind_contents(StageFolder(folder / "stages"), model, examples)
        splits = {name: task.encode(processor, found) for name, found in examples.items()}
        lock = None if folder is None or settings.jobs == 1 else folder / "quiet.lock"
        probe = on_device(next(iter(splits["validation"].batches(4))), model)
        single = settings.dtype == "float32"
        prove_sites(model, space.sites, probe, tolerance=1e-5 if single else 5e-2)
        refused = refuse_unsound(model, space.sites, probe, tolerance=1e-4 if single else 5e-2)
        sound = tuple(site for site in space.sites if site.name not in refused)
        space = replace(space, sites=sound, ends=ends_of_stacks(model, sound))
        changed = [apply_skips(model, space.config(skip)) for skip in ((), [site.index for site in space.sites])]
        limits_of_caches = (settings.caches.features, settings.caches.prefixes)
        attach_caches(model, changed, every, probe, limits_of_caches, tolerance=1e-5 if single else 5e-2)
        prove_last_logits(changed[1], probe, tolerance=1e-4 if single else 5e-2)
        kept = KeptAdapters(folder and folder / "stages" / "trials", settings.caches.adapters)
        quiet = QuietLock(lock)
        conditions = Conditions(
            quiet.shared,
            in_bf16(settings, model, folder),
            all_short(model, probe),
            labels_suffice(changed[1], probe, tolerance=1e-4 if single else 5e-2),
        )
        return cls(
            settings, task, model, processor, every, space, splits, quiet, refused, kept=kept, conditions=conditions
        )

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """The searchable attention sites."""
        return self.space.sites

    def student(self, config: SkipConfig) -> nn.Module:
        """The model without the attentions that `config` skips, see `apply_skips`."""
        return apply_skips(self.model, config, self.every)

    @property
    def caches(self) -> Caches:
        """What the model and its copies share."""
        found: Any = self.model.eas_caches
        return found

    def latency_inputs(self) -> dict[str, Tensor]:
        """The batch of prompts on which latency is measured."""
        prompts = self.splits["validation"].prompts(self.settings.latency_batch)
        return on_device(prompts, self.model)

    @cached_property
    def site_classes(self) -> SiteClasses:
        """Sites whose attentions cost the same, see `latency.terms`."""
        return site_classes(self.model, self.sites)

    def predicted_latency(self, config: SkipConfig) -> tuple[float, float, float]:
        """(ratio, low, high) of the merged model's prefill time to the original model's, not measured."""
        assert self.predictor is not None, "predictor_stage comes before the first prediction"
        return self.predictor.predict(terms_of(config, self.site_classes))

    @property
    def hardware(self) -> dict[str, Any]:
        """Where the figures were measured."""
        import os
        import platform

        device = device_of(self.model)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
        return {
            "device": str(device),
            "name": name,
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "system": f"{platform.system()} {platform.machine()}",
        }


def in_bf16(settings: SearchSettings, model: nn.Module, folder: Path | None) -> bool:
    """Whether the search computes in bfloat16; a study that was begun on another machine goes on as it began."""
    if folder is None or settings.mixed_precision != "auto":
        return computes_in_bf16(settings.mixed_precision, model)
    decided = StageFolder(folder / "stages").once("precision", lambda: {"bf16": computes_in_bf16("auto", model)})
    return bool(decided["bf16"])


def load_for_task(task: Task, name: str, options: LoadOptions) -> tuple[nn.Module, Any]:
    """(model with the head that the task needs, processor); classes stand in the model's own order if it knows them.

    Raises:
        EasSearchError: whatever is wrong with the model or the task's data.
    """
    config = load_config(model_location(name), name, options.trust_remote_code)
    if getattr(config, "num_images", task.num_images) != task.num_images:
        raise UnsupportedModelError(
            f"model {name!r} reads {config.num_images} image(s) with a text, task {task.name!r} has {task.num_images}; "
            "expected as many: convert the checkpoint for this task"
        )
    if task.labels is not None:
        task.adopt_labels([str(label) for label in (getattr(config, "id2label", None) or {}).values()])
    return load_model(name, options, task.head, task.labels)


def searched_space(settings: SearchSettings, task: Task, every: Sequence[AttentionSite]) -> SearchSpace:
    """The search space: what the user asked for, and where that says nothing, what fits the model and the task.

    Raises:
        ConfigError: the model has no site in the towers that the user asked for.
    """
    wishes = settings.space
    has = list(dict.fromkeys(site.tower for site in every))  # text first
    # Layers in which two streams meet are what a task changes most; else it is the text tower, or the only one.
    towers: Any = wishes.towers or (("fusion",) if "fusion" in has else (has[0],))
    sites = tuple(site for site in every if site.tower in towers)
    if not sites:
        raise ConfigError(f"space.towers is {list(towers)}, but the model only has {has}; choose one of these")
    whole = all(set(site.placements) >= {"parallel", "ffn"} for site in sites) and settings.quantization is None
    placements = wishes.placements or (("parallel", "ffn") if whole else ("residual",))
    usual = "none" if any(site.causal for site in every) else task.pooling
    student = settings.student.model_dump() | {"pooling": settings.student.pooling or usual}
    if student["adapter_towers"] is None and ("text" not in has or towers == ("fusion",)):
        # The adapter-only baseline would otherwise train nothing but the head, or adapters elsewhere.
        student["adapter_towers"] = towers
    choices = SpaceSettings(towers=towers, pia_dims=wishes.pia_dims, placements=placements)
    return SearchSpace(sites, choices, SkipConfig(**student), settings.fixed_k)


def _cpu_name() -> str:
    import platform

    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
