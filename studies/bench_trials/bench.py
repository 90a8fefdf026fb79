"""Trials per hour with every trick, with the exact ones alone, and with none, on the same skip configurations.

python studies/bench_trials/bench.py [--quick]
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from eas_search.latency import measure_latency
from eas_search.measures import kv_bytes_per_token, parameter_count, prefill_flops
from eas_search.merging import merge
from eas_search.objective import TrialResult, evaluate, foretold_cost, order_seed
from eas_search.prediction import predictor_stage
from eas_search.rungs import strongest_rival, unpack
from eas_search.settings import SearchSettings
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.stage_folder import StageFolder
from eas_search.stages import baseline_stage, supernet_stage
from eas_search.study.heap import settled_heap
from eas_search.supernet import Supernet
from eas_search.training import fine_tune, sample_scores, seeded
from eas_search.workbench import Workbench

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from record import load_config, write_result  # noqa: E402

NO_TRICKS: dict[str, Any] = {"latency": "measured", "rungs": (), "mixed_precision": "no"}
AS_RUN = ("exact tricks", "all tricks")  # also spared the garbage collector's rounds, as all that `run_study` does
NO_CACHES = {"features": 0, "prefixes": 0}


@dataclass
class Place:
    """A workbench with its supernet."""

    bench: Workbench
    supernet: Supernet
    redundancy: list[float]


def naive(bench: Workbench, config: SkipConfig, steps: int) -> float:
    """A trial as a first script would do it; returns the accuracy."""
    settings, seed = bench.settings, order_seed(bench.settings.seed)
    with seeded(seed):
        student = apply_skips(copy.deepcopy(bench.model), config)
    fine_tune(student, bench.splits["train"], settings.trial.model_copy(update={"steps": steps}), seed)
    accuracy = sample_scores(student, bench.splits["validation"]).double().mean().item()
    merged, inputs = merge(student).eval(), bench.latency_inputs()
    measure_latency(merged, inputs, baseline=bench.model, config=settings.trial_latency)
    kv_bytes_per_token(merged, inputs), prefill_flops(merged, inputs), parameter_count(merged)
    return accuracy


def equal_steps(place: Place, configs: list[SkipConfig], choices: list[int]) -> tuple[int, dict[str, float]]:
    """(fewest steps from scratch that are as accurate as an inherited start, else the most; accuracies by steps)."""
    bench = place.bench
    wanted = float(np.mean([evaluate(bench, place.supernet, place.redundancy, c).accuracy for c in configs]))
    found = {"inherited": wanted}
    for steps in choices:
        found[str(steps)] = float(np.mean([naive(bench, config, steps) for config in configs]))
        if found[str(steps)] >= wanted:
            return steps, found
    return choices[-1], found


def draw(bench: Workbench, count: int, seed: int) -> list[SkipConfig]:
    """Different configurations of any size."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        size = int(rng.integers(1, len(bench.sites) + 1))
        skip = rng.choice([site.index for site in bench.sites], size, replace=False).tolist()
        choices = (len(bench.space.choices.pia_dims), len(bench.space.choices.placements))
        config = bench.space.config(skip, *(int(rng.integers(n)) for n in choices))
        found[config] = None
    return list(found)


def open_places(settings: SearchSettings, folder: Path) -> tuple[dict[str, Place], dict[str, float]]:
    """Workbenches with and without tricks over one trained supernet, and the seconds of what they share."""
    stages, places, seconds = StageFolder(folder), {}, {}
    changes = {
        "all": {},
        "exact": NO_TRICKS,
        "plain": {**NO_TRICKS, "caches": settings.caches.model_copy(update=NO_CACHES)},
    }
    adapted = None
    for name, update in changes.items():
        bench = Workbench.open(settings.model_copy(update=update))
        if name == "plain":
            bench.conditions = replace(bench.conditions, labelled=False)
        if adapted is None:
            adapted = baseline_stage(bench, stages, lambda *_: None)[1]
            begin = time.perf_counter()
        supernet, redundancy = supernet_stage(bench, stages, adapted, lambda *_: None)
        seconds.setdefault("supernet", time.perf_counter() - begin)
        places[name] = Place(bench, supernet, redundancy)
    begin = time.perf_counter()
    predictor_stage(places["all"].bench, stages)
    return places, {**seconds, "predictor": time.perf_counter() - begin}


def compare(settings: SearchSettings, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """All variants on the same configurations."""
    places, shared = open_places(settings, folder)
    plain, exact, every = places["plain"], places["exact"], places["all"]
    configs = draw(plain.bench, config["warmup"] + config["trials"], config["seed"])
    steps = settings.trial.steps
    enough, from_scratch = steps, {}
    if steps:
        enough, from_scratch = equal_steps(plain, configs[: config["probed"]], config["from_scratch_steps"])
    cost, known = foretold_cost(every.bench), {}

    def searched(place: Place, trial: SkipConfig, rungs: bool = False) -> TrialResult:
        rival = strongest_rival(known.items(), trial, cost) if rungs else None
        return evaluate(place.bench, place.supernet, place.redundancy, trial, rival)

    variants: dict[str, Callable[[SkipConfig], Any]] = {
        "naive": lambda trial: naive(plain.bench, trial, steps),
        "naive, as accurate": lambda trial: naive(plain.bench, trial, enough),
        "inherited": lambda trial: searched(plain, trial),
        "exact tricks": lambda trial: searched(exact, trial),
        "all tricks": lambda trial: searched(every, trial, rungs=True),
    }
    if not steps:
        del variants["naive, as accurate"]
    rng = np.random.default_rng(config["seed"])
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    accuracy: dict[str, list[float]] = {name: [] for name in variants}
    different = []
    for number, trial in enumerate(configs):
        results = {}
        for name in rng.permutation(list(variants)).tolist():
            with settled_heap() if name in AS_RUN else nullcontext():
                begin = time.perf_counter()
                results[name] = variants[name](trial)
                elapsed = time.perf_counter() - begin
            if number >= config["warmup"]:
                seconds[name].append(elapsed)
                accuracy[name].append(getattr(results[name], "accuracy", results[name]))
        known[trial] = results["all tricks"]
        scores = [unpack(results[name].scores) for name in ("inherited", "exact tricks")]
        different.append(int((scores[0] != scores[1]).sum()))
        if different[-1] and not steps:
            raise AssertionError(f"{trial.skip}: {different[-1]} samples differ although the tricks are exact")
    shared_out = sum(shared.values()) / config["charged_over"]
    rows = {
        name: {
            "trials_per_hour": 3600 / float(np.mean(values)),
            "ratio": ratio(seconds["naive"], values, config["seed"]),
            "accuracy": float(np.mean(accuracy[name])),
            "ratio_with_shared_costs": float(
                np.mean(seconds["naive"]) / (np.mean(values) + (0 if name.startswith("naive") else shared_out))
            ),
        }
        for name, values in seconds.items()
    }
    return {
        "variants": rows,
        "seconds": seconds,
        "shared_seconds": shared,
        "steps": {"trial": steps, "as_accurate": enough, "accuracy": from_scratch},
        "samples_scored_differently": {"by_trial": different, "of": len(plain.bench.splits["validation"])},
        "largest_accuracy_difference": max(
            abs(a - b) for a, b in zip(accuracy["inherited"], accuracy["exact tricks"], strict=True)
        ),
        "stopped_early": sum(result.stopped_at is not None for result in known.values()),
        "caches": every.bench.caches.report(),
        "models_run_for_costs": every.bench.costs.measured,
    }


def ratio(base: list[float], values: list[float], seed: int) -> dict[str, float]:
    """Total / total with a 95 % bootstrap interval over the trials."""
    first, second = np.asarray(base), np.asarray(values)
    rows = np.random.default_rng(seed).integers(len(first), size=(4000, len(first)))
    low, high = np.quantile(first[rows].sum(1) / second[rows].sum(1), [0.025, 0.975])
    return {"estimate": float(first.sum() / second.sum()), "low": float(low), "high": float(high)}


def main() -> None:
    """Run both modes, print their tables, write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="at most two minutes")
    parser.add_argument("--mode", help="only this one of the configuration's modes")
    parser.add_argument("--output", type=Path, default=HERE, help="whose results folder gets the result")
    options = parser.parse_args()
    config = load_config(HERE)
    config.update(config.pop("quick") if options.quick else {})
    settings = SearchSettings(model=config["model"], task=config["task"], seed=config["seed"], **config["settings"])
    found = {}
    for mode, steps in config["modes"].items():
        if options.mode not in (None, mode):
            continue
        with tempfile.TemporaryDirectory() as folder:
            chosen = settings if steps is None else settings.fine_tuned_for(steps)
            found[mode] = compare(chosen, config, Path(folder))
        table = Table("", "trials/hour", "/ naive", "95 %", "accuracy", "/ naive, shared costs included", title=mode)
        for name, row in found[mode]["variants"].items():
            low, high = row["ratio"]["low"], row["ratio"]["high"]
            cells = f"{row['trials_per_hour']:.0f}", f"{row['ratio']['estimate']:.2f}", f"{low:.2f} – {high:.2f}"
            table.add_row(name, *cells, f"{row['accuracy']:.3f}", f"{row['ratio_with_shared_costs']:.2f}")
        Console().print(table)
    content = {"seed": config["seed"], "quick": options.quick, "config": config, "modes": found}
    hardware = Workbench.open(settings).hardware
    options.output.mkdir(parents=True, exist_ok=True)
    print("wrote", write_result(options.output, "quick" if options.quick else "full", content, hardware).name)


if __name__ == "__main__":
    main()
