"""The stages before the trials: the baseline, and the supernet with its scores. Each is done once and kept."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from eas_search.exceptions import StorageError
from eas_search.latency import measure_latency
from eas_search.measures import accuracy_interval, kv_bytes_per_token, parameter_count
from eas_search.redundancy.bandit import EasBandit, bandit_step
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import adapter_parameters, apply_skips, load_adapters
from eas_search.supernet import Supernet
from eas_search.training import correct_answers, endless, fine_tune, seeded
from eas_search.warm_start import calibrate
from eas_search.workbench import Workbench

Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Baseline:
    """The unmodified model on the task, and its adapter-only fine-tune (light adapters at every site, nothing skipped).

    `accuracy` is that of adapters trained for as many steps as a finalist's: a finalist has been through the baseline's
    fine-tune, the supernet's and its own. Accuracies are held-out (test), times of the timed batch in seconds.
    """

    zero_shot_accuracy: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    validation_accuracy: float
    prefill_s: float
    decode_s: float | None
    kv_bytes: int
    parameters: int
    seconds: float


class StageFolder:
    """Where finished stages are kept, so that a search resumes behind them. Files appear whole or not at all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Keep a stage: its tensors first, then the record that says it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        temporary = self.folder / f"{name}.safetensors.tmp"
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, temporary)
        os.replace(temporary, self.folder / f"{name}.safetensors")
        record = self.folder / f"{name}.json.tmp"
        record.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(record, self.folder / f"{name}.json")

    def read(self, name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]] | None:
        """A kept stage, or None when it is not complete.

        Raises:
            StorageError: the files are there but damaged.
        """
        record = self.folder / f"{name}.json"
        if not record.is_file():
            return None
        try:
            return json.loads(record.read_text(encoding="utf-8")), load_file(self.folder / f"{name}.safetensors")
        except (OSError, ValueError, SafetensorError) as error:
            raise StorageError(
                f"stage {name!r} in {str(self.folder)!r} is damaged ({type(error).__name__}); expected what an earlier "
                f"run wrote: move {name}.json away to compute it again, the trials are kept"
            ) from error


def unskipped(settings: SearchSettings) -> SkipConfig:
    """The configuration of the adapter-only baseline."""
    return settings.student.model_copy(update={"skip": ()})


def baseline_stage(bench: Workbench, folder: StageFolder, report: Report) -> tuple[Baseline, nn.Module]:
    """Score and time the original model, then fine-tune light adapters alone.

    Returns:
        The figures, and the adapter-only student after the baseline's own steps, from which the supernet starts.
    """
    with seeded(bench.settings.seed):
        student = apply_skips(bench.model, unskipped(bench.settings))
    kept = folder.read("baseline")
    if kept is not None:
        load_adapters(student, kept[1])
        return Baseline(**kept[0]), student
    begin, settings, train = time.perf_counter(), bench.settings, bench.splits["train"]
    first, rest = settings.baseline, settings.supernet.training.steps + settings.final.steps
    zero_shot = correct_answers(bench.model, bench.splits["test"])

    def advance(step: int, _: nn.Module) -> None:
        report("baseline", step + 1, first.steps + rest)

    fine_tune(student, train, first, settings.seed, advance)
    start = {name: parameter.detach().clone() for name, parameter in adapter_parameters(student).items()}
    equal = settings.final.model_copy(update={"steps": rest})
    fine_tune(student, train, equal, settings.seed + 1, lambda step, model: advance(first.steps + step, model))
    test = correct_answers(student, bench.splits["test"])
    validation = correct_answers(student, bench.splits["validation"])
    load_adapters(student, start)
    inputs = bench.latency_inputs()
    timing = measure_latency(bench.model, inputs, baseline=bench.model, config=bench.settings.final_latency)
    accuracy, low, high = accuracy_interval(test)
    baseline = Baseline(
        zero_shot_accuracy=zero_shot.float().mean().item(),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        validation_accuracy=validation.float().mean().item(),
        prefill_s=timing.prefill.baseline.median,
        decode_s=None if timing.decode is None else timing.decode.baseline.median,
        kv_bytes=kv_bytes_per_token(bench.model, inputs),
        parameters=parameter_count(bench.model),
        seconds=time.perf_counter() - begin,
    )
    folder.write("baseline", asdict(baseline), dict(adapter_parameters(student)))
    return baseline, student


def empty_supernet(bench: Workbench) -> Supernet:
    """The supernet before any training: largest rank, the adapters of every placement."""
    settings = bench.settings
    config = settings.student.model_copy(
        update={"skip": (), "pia_dim": max(settings.space.pia_dims), "placement": "parallel"}
    )
    with seeded(bench.settings.seed):
        return Supernet(bench.model, bench.sites, config)


def supernet_stage(
    bench: Workbench, folder: StageFolder, adapted: nn.Module | None, report: Report
) -> tuple[Supernet, list[float]]:
    """Attach PIAs of the largest rank to every site, start them in closed form, train them jointly, score redundancy.

    Args:
        bench: model and samples.
        folder: where the result is kept.
        adapted: the adapter-only student; None in a worker, which only reads what the coordinator kept.
        report: called with (stage, done, total).

    Returns:
        The supernet and the redundancy score of every searchable site.
    """
    supernet = empty_supernet(bench)
    kept = folder.read("supernet")
    if kept is not None:
        supernet.load_adapters(kept[1])
        return supernet, kept[0]["redundancy"]
    assert adapted is not None, "a worker starts after the supernet is kept"
    begin = time.perf_counter()
    if bench.settings.student.adapter_dim > 0:
        supernet.take_light_adapters(adapted)
    samples = bench.splits["train"].subset(bench.settings.samples.calibration)
    moments = calibrate(supernet.model, bench.sites, samples.batches(64), supernet.config.identity)
    explained = supernet.warm_start(moments)
    redundancy = _train_jointly(bench, supernet, report)
    content = {
        "redundancy": redundancy,
        "sites": [site.name for site in bench.sites],
        "places": [(site.index, site.tower) for site in bench.sites],
        "explained": explained,
        "seconds": time.perf_counter() - begin,
    }
    folder.write("supernet", content, supernet.adapters())
    return supernet, redundancy


def _train_jointly(bench: Workbench, supernet: Supernet, report: Report) -> list[float]:
    """Random skip sets in the first half; in the second the bandit draws them and learns from validation losses."""
    settings = bench.settings.supernet
    steps, updates = settings.training.steps, settings.bandit_updates
    bandit = EasBandit(len(bench.sites))
    generator = torch.Generator().manual_seed(bench.settings.seed + 1)
    batches = iter(endless(bench.splits["validation"], settings.bandit_batch, generator))
    placements = bench.settings.space.placements
    done = 0

    def watch(step: int) -> None:
        nonlocal done
        due = min(updates, updates * max(0, 2 * (step + 1) - steps) // max(1, steps))
        while done < due and len(bench.sites) >= 3:
            size = int(torch.randint(1, len(bench.sites) - 1, (1,), generator=generator))
            bandit_step(bandit, supernet, next(batches), max(size, 1), generator)
            done += 1

    def before_step(step: int, _: nn.Module) -> None:
        report("supernet", step + 1, steps)
        watch(step - 1)
        size = int(torch.randint(1, len(bench.sites) + 1, (1,), generator=generator))
        chosen = bandit.draw(size, generator, count=1)[0]
        placement = placements[int(torch.randint(len(placements), (1,), generator=generator))]
        supernet.set_skips((bench.sites[i].index for i in chosen), placement)

    fine_tune(supernet.model, bench.splits["train"], settings.training, bench.settings.seed, before_step=before_step)
    watch(max(0, steps - 1) if steps else 0)
    supernet.set_skips(())
    return bandit.scores.tolist()
