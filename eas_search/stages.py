"""The stages before the trials: the baseline, and the supernet with its scores. Each is done once and kept."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field

import torch
from torch import nn

from eas_search.exceptions import StorageError
from eas_search.joint_training import Report, one_shot_scores, train_jointly
from eas_search.latency import measure_latency
from eas_search.measures import accuracy_interval, kv_bytes_per_token, parameter_count, prefill_flops
from eas_search.skipping import adapter_parameters, load_adapters
from eas_search.stage_folder import StageFolder
from eas_search.supernet import Supernet
from eas_search.training import fine_tune, sample_scores, seeded
from eas_search.warm_start import calibrate
from eas_search.workbench import Workbench


@dataclass(frozen=True)
class Baseline:
    """The unmodified model on the task, and its adapter-only fine-tune (light adapters at every site, nothing skipped).

    `accuracy` is that of adapters trained for as many steps as a finalist's: a finalist has been through the baseline's
    fine-tune, the supernet's and its own. Accuracies are mean scores by the task's metric; they are held-out (test), as
    are the breakdowns, which hold further figures by name, but for the one on the selection samples. Times are those of
    the timed batch in seconds, FLOPs those of its prefill.
    """

    zero_shot_accuracy: float
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    selection_accuracy: float
    prefill_s: float
    decode_s: float | None
    kv_bytes: int
    parameters: int
    flops: int
    seconds: float
    latency: float = 1.0  # the unit of latency ratios
    zero_shot_breakdown: dict[str, float] = field(default_factory=dict)
    breakdown: dict[str, float] = field(default_factory=dict)


def baseline_stage(bench: Workbench, folder: StageFolder, report: Report) -> tuple[Baseline, nn.Module]:
    """Score and time the original model, then fine-tune light adapters alone.

    Returns:
        The figures, and the adapter-only student after the baseline's own steps, from which the supernet starts.
    """
    with seeded(bench.settings.seed):
        student = bench.student(bench.space.student)
    kept = folder.read("baseline")
    if kept is not None:
        if kept[0].keys() != Baseline.__dataclass_fields__.keys():
            raise StorageError(
                f"stage 'baseline' in {str(folder.folder)!r} is of another version of eas_search; expected this one: "
                "use that version, or search again into another --output"
            )
        load_adapters(student, kept[1])
        return Baseline(**kept[0]), student
    begin, settings, train = time.perf_counter(), bench.settings, bench.splits["train"]
    first, rest = settings.baseline, settings.supernet.training.steps + settings.final.steps
    zero_shot = sample_scores(bench.model, bench.splits["test"])

    def advance(step: int, _: nn.Module) -> None:
        report("baseline", step + 1, first.steps + rest)

    fine_tune(student, train, first, settings.seed, advance, bench.conditions)
    start = {name: parameter.detach().clone() for name, parameter in adapter_parameters(student).items()}
    # As a finalist, but nothing is skipped here: there is no other model to learn from.
    equal = settings.final.model_copy(update={"steps": rest, "distill": 0.0})

    def advance_further(step: int, model: nn.Module) -> None:
        advance(first.steps + step, model)

    fine_tune(student, train, equal, settings.seed + 1, advance_further, bench.conditions)
    test = sample_scores(student, bench.splits["test"])
    selection = sample_scores(student, bench.splits["selection"])
    load_adapters(student, start)
    inputs = bench.latency_inputs()
    # For orientation: every ratio that is reported comes from a run in which the baseline is timed beside the others.
    quick = settings.trial_latency.model_copy(update={"decode_tokens": settings.final_latency.decode_tokens})
    timing = measure_latency(bench.model, inputs, baseline=bench.model, config=quick)
    accuracy, low, high = accuracy_interval(test)
    held_out = bench.splits["test"]
    baseline = Baseline(
        zero_shot_accuracy=zero_shot.double().mean().item(),
        accuracy=accuracy,
        accuracy_low=low,
        accuracy_high=high,
        selection_accuracy=selection.double().mean().item(),
        prefill_s=timing.prefill.baseline.median,
        decode_s=None if timing.decode is None else timing.decode.baseline.median,
        kv_bytes=kv_bytes_per_token(bench.model, inputs),
        parameters=parameter_count(bench.model),
        flops=prefill_flops(bench.model, inputs),
        seconds=time.perf_counter() - begin,
        zero_shot_breakdown=held_out.scoring.report(held_out, zero_shot),
        breakdown=held_out.scoring.report(held_out, test),
    )
    folder.write("baseline-scores", {}, {"held_out": test})
    folder.write("baseline", asdict(baseline), dict(adapter_parameters(student)))
    return baseline, student


def baseline_scores(folder: StageFolder) -> torch.Tensor:
    """Held-out scores of the baseline, [N], in the order of the test split.

    Raises:
        StorageError: the baseline stage is not over, or its files are damaged.
    """
    kept = folder.read("baseline-scores")
    if kept is None:
        raise StorageError(f"{str(folder.folder)!r} has no scores of the baseline; expected them: run the search again")
    return kept[1]["held_out"]


def empty_supernet(bench: Workbench) -> Supernet:
    """The supernet before any training: largest rank, the adapters of every placement."""
    update = {"pia_dim": max(bench.space.choices.pia_dims), "placement": "parallel"}
    config = bench.space.student.model_copy(update=update)
    with seeded(bench.settings.seed):
        supernet = Supernet(bench.model, bench.sites, config)
    supernet.placement = bench.space.choices.placements[0]
    return supernet


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
        The supernet and the redundancy score of every searchable site by the metric that the settings rank by. The
        kept record holds those of all metrics.
    """
    supernet = empty_supernet(bench)
    kept = folder.read("supernet")
    if kept is not None:
        supernet.load_adapters(kept[1])
        return supernet, kept[0]["redundancy"]
    assert adapted is not None, "a worker starts after the supernet is kept"
    begin = time.perf_counter()
    supernet.take_light_adapters(adapted)
    samples = bench.splits["train"].subset(bench.settings.samples.calibration)
    moments = calibrate(supernet.model, bench.sites, samples.batches(64), supernet.config.identity)
    explained = supernet.warm_start(moments)
    scores = {"bandit": train_jointly(bench, supernet, report), **one_shot_scores(bench, supernet)}
    redundancy = scores[bench.settings.ranking]
    content = {
        "redundancy": redundancy,
        "ranking": bench.settings.ranking,
        "metrics": scores,
        "sites": [site.name for site in bench.sites],
        "places": [(site.index, site.tower) for site in bench.sites],
        "explained": explained,
        "seconds": time.perf_counter() - begin,
    }
    folder.write("supernet", content, supernet.adapters())
    return supernet, redundancy
