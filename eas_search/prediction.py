"""The stage that fits the latency predictor: a few configurations are built, merged and timed; it is done once."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from eas_search.latency import PhaseLatency, measure_latency
from eas_search.latency.predictor import (
    LatencyPredictor,
    fit_predictor,
    independent_terms,
)
from eas_search.latency.terms import ORIGINAL, Row, SiteClasses, terms_of
from eas_search.merging import merge
from eas_search.search_space import SearchSpace
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder
from eas_search.workbench import Workbench

TOGETHER_BYTES = 2**30  # models that hold more in all are timed one after the other, each against the original
PRECISE = 0.03  # standard error of predictions at which no further pass is measured
SPARE = 2  # measured configurations beyond the number of terms, which say how good the fit is


def measured_configs(space: SearchSpace, classes: SiteClasses) -> list[SkipConfig]:
    """What a predictor for `space` is fitted to.

    Nothing skipped; per class and placement a third of its sites and all of them with the smallest rank, two thirds and
    all of them with the largest; everything at once where there are several classes. Rank 0, plain deletion, is a form
    of its own. Where latency also depends on which sites they are, one of the parts is spread over the class and the
    other is the end of its stack; if that is so of one form alone, both are measured both ways. Where all that is too
    little to say how good the fit is, each is measured more often.

    Args:
        space: the search space.
        classes: of its sites, by index.
    """
    members = classes.members()
    every, dims = space.config(()), space.choices.pia_dims
    ranks = sorted(range(len(dims)), key=lambda position: dims[position])
    kept = [position for position in ranks if dims[position]]
    forms = [(kept[0], kept[-1], place) for place in range(len(space.choices.placements))] if kept else []
    forms += [(ranks[0], ranks[0], 0)] if dims[ranks[0]] == 0 else []
    found = [every]
    for own in members.values():
        end = next((end for end in classes.ends if own[-1] in end), ())
        # Forms whose latency depends on whether sites are the last ones.
        local = [f for f in forms if end and (space.student.pooling == "none" or dims[f[0]] == 0)]
        for form in forms:
            smallest, largest, place = form
            for dim, share in ((smallest, 1 / 3), (smallest, 1.0), (largest, 2 / 3), (largest, 1.0)):
                count = math.ceil(share * len(own))
                spread = [own[i * len(own) // count] for i in range(count)]
                last = form in local and (local == [form] or (share > 1 / 2) == (local.index(form) % 2 == 0))
                if not last or local == [form]:
                    found.append(space.config(spread, dim, place))
                if last:
                    found.append(space.config(end[: math.ceil(share * len(end))], dim, place))
    if len(members) > 1:
        found.append(space.config([site.index for site in space.sites]))
    found = list(dict.fromkeys(found))
    terms = len(independent_terms([terms_of(config, classes) for config in found]))
    return found * math.ceil((terms + SPARE) / len(found))


def predictor_stage(bench: Workbench, folder: StageFolder) -> LatencyPredictor:
    """The predictor of this model, space and timed batch, kept in `folder`; the workbench then has it, too.

    Raises:
        EasSearchError: a configuration does not fit the model, or a model cannot be timed.
    """
    kept = folder.read("predictor")
    content: dict[str, Any] = {} if kept is None else kept[0]
    if kept is None:
        begin = time.perf_counter()
        classes = bench.site_classes
        configs, latency = measured_configs(bench.space, classes), bench.settings.fit_latency
        rows, passes, errors = list[Row](), list[list[float]](), list[float]()
        for phases in islice(_passes(bench, configs), bench.settings.fit_passes):
            rows += [{ORIGINAL: 1.0}, *(terms_of(config, classes) for config in configs)]
            passes.append([phase.ratio.estimate for phase in phases])
            errors += [phase.error for phase in phases]
            ratios = alike(passes)
            noise = float(np.sqrt(np.mean(np.square(errors))))
            fitted = fit_predictor(rows, ratios, latency.confidence, latency.process_sd, noise)
            if fitted.standard_error <= PRECISE:
                break
        content = {
            "predictor": fitted.to_dict(),
            "measured": [{**row, "ratio": ratio} for row, ratio in zip(rows, chain(*passes), strict=True)],
            "seconds": time.perf_counter() - begin,
        }
        folder.write("predictor", content, {})
    bench.predictor = LatencyPredictor.from_dict(content["predictor"])
    return bench.predictor


def alike(passes: Sequence[Sequence[float]]) -> list[float]:
    """The ratios of all passes, one after the other, without what the passes differ by on the whole.

    Those of one pass share the error of its timing of the original model.

    Args:
        passes: of the same configurations each.
    """
    logs = np.log(passes)
    return [float(ratio) for ratio in np.exp(logs - logs.mean(axis=1, keepdims=True) + logs.mean()).ravel()]


def _passes(bench: Workbench, configs: Sequence[SkipConfig]) -> Iterator[list[PhaseLatency]]:
    """Prefill time beside the original model's, of the original itself and every configuration merged, pass after pass.

    Untrained, which changes no shape.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in bench.model.parameters())
    if size * (2 + len(configs)) < TOGETHER_BYTES:
        models = [bench.model, *(merge(bench.student(config)).eval() for config in configs)]
        while True:
            yield _prefills(bench, models)
    while True:
        phases = _prefills(bench, [bench.model])
        for config in configs:
            phases += _prefills(bench, [merge(bench.student(config)).eval()])
        yield phases


def _prefills(bench: Workbench, models: Sequence[nn.Module]) -> list[PhaseLatency]:
    """Prefill time beside the original model's, side by side."""
    named = {str(position): model for position, model in enumerate(models)}
    with bench.quiet.exclusive():
        config = bench.settings.fit_latency
        report = measure_latency(named, bench.latency_inputs(), baseline=bench.model, config=config)
    return [report[name].prefill for name in named]


def finalists_errors(bench: Workbench, front: pd.DataFrame) -> dict[int, float]:
    """Predicted / measured - 1 of the finalists, by trial number; `front` has columns number, config and latency."""
    rows = zip(front["number"], front["config"], front["latency"], strict=True)
    return {
        int(number): bench.predicted_latency(SkipConfig(**config))[0] / float(latency) - 1
        for number, config, latency in rows
    }


def describe_errors(errors: Mapping[int, float]) -> str:
    """One line on how well the finalists' latencies had been predicted."""
    sizes = [abs(error) for error in errors.values()]
    return (
        f"Predicted against measured latency of the {len(sizes)} finalists: {100 * sum(sizes) / len(sizes):.1f} % off "
        f"on average, {100 * max(sizes):.1f} % at most"
    )


def prediction_report(bench: Workbench, folder: StageFolder, front: pd.DataFrame) -> dict[str, Any]:
    """How the latencies of trials came about, for `summary.json`; errors are relative, seconds are those of the fit."""
    kept = folder.read("predictor")
    if bench.settings.latency == "measured" or kept is None:
        return {"trials": "measured"}
    fitted, errors = LatencyPredictor.from_dict(kept[0]["predictor"]), finalists_errors(bench, front)
    return {
        "trials": "predicted",
        "measured_models": len(fitted.errors),
        "standard_error": fitted.standard_error,
        "seconds": kept[0]["seconds"],
        "leave_one_out_error": fitted.leave_one_out,
        "finalists_mape": sum(map(abs, errors.values())) / len(errors),
        "finalists_errors": {str(number): error for number, error in errors.items()},
    }
