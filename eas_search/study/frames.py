"""A study as tables: one row per trial, one row per finalist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from optuna.study import Study
from torch import Tensor

from eas_search.architectures import AttentionSite
from eas_search.finalists import Finalist
from eas_search.front_statistics import dominance, paired_difference
from eas_search.report.front import knee_point, non_dominated, prefer
from eas_search.skip_config import SkipConfig

COSTS = ("latency",)
CHANGE = ("accuracy_change", "accuracy_change_low", "accuracy_change_high")
STOPPED = "STOPPED"  # told to Optuna as complete, see `rungs`
TRIAL_COLUMNS = (
    "number",
    "state",
    "skip",
    "skip_names",
    "pia_dim",
    "placement",
    "accuracy",
    "latency",
    "latency_low",
    "latency_high",
    "redundancy",
    "kv_bytes",
    "parameters",
    "flops",
    "seconds",
    "device",
    "stopped_at",
    "origin",
    "config",
)


def trials_frame(study: Study, names: Mapping[int, str] | None = None) -> pd.DataFrame:
    """One row per trial that is finished: COMPLETE, STOPPED (its accuracy is an estimate) or FAIL (figures are NaN).

    `names` are the sites' names by index, for the column `skip_names`.
    """
    names = names or {}
    rows = []
    for trial in study.get_trials(deepcopy=False):
        if not trial.state.is_finished():
            continue
        config, result = trial.user_attrs.get("config", {}), trial.user_attrs.get("result", {})
        skip = tuple(config.get("skip", ()))
        known = {
            "number": trial.number,
            "state": trial.state.name if result.get("stopped_at") is None else STOPPED,
            "skip": skip,
            "skip_names": tuple(names.get(index, str(index)) for index in skip),
            "pia_dim": int(config.get("pia_dim", 0)),
            "placement": config.get("placement", ""),
            "origin": trial.user_attrs.get("origin", ""),
            "config": config,
        }
        figures = {name: result.get(name, "" if name == "device" else float("nan")) for name in TRIAL_COLUMNS}
        rows.append({**figures, **known})
    return pd.DataFrame(rows, columns=list(TRIAL_COLUMNS))


def pareto_front(study: Study) -> pd.DataFrame:
    """The completed trials that no other one dominates (accuracy up, the study's costs down), cheapest first."""
    trials = trials_frame(study)
    costs = list(study.user_attrs.get("settings", {}).get("objectives", ("accuracy", *COSTS))[1:])
    done = trials[trials["state"] == "COMPLETE"].astype(dict.fromkeys(["accuracy", *costs], float))
    kept = non_dominated(done["accuracy"].to_numpy(), done[costs].to_numpy())
    return done[kept].sort_values(costs[0]).reset_index(drop=True)


def front_frame(
    finalists: Sequence[Finalist],
    figures: Mapping[int, Mapping[str, Any]],
    sites: Sequence[AttentionSite],
    baseline: Tensor,
    costs: Sequence[str] = COSTS,
) -> pd.DataFrame:
    """One row per finalist with the objectives and their intervals, fastest first; nothing is chosen yet.

    `on_front` marks the non-dominated points by held-out accuracy and side-by-side latency. Column `front` says how
    sure that is: `front`, `dominated` (beyond the interval, see `front_statistics.dominance`), or `undecided` (another
    point dominates it, but is not surely more accurate). `accuracy_change` is the difference to the baseline on the
    same held-out samples.

    Args:
        finalists: re-trained configurations.
        figures: their latencies, by trial number.
        sites: all searchable sites.
        baseline: held-out scores of the baseline, [N].
        costs: columns that are minimised.
    """
    names = {site.index: site.name for site in sites}
    rows = []
    for finalist in finalists:
        config: SkipConfig = finalist.config
        skip = tuple(int(index) for index in config.skip)
        rows.append(
            {
                "number": finalist.number,
                "skip": skip,
                "skip_names": tuple(names[index] for index in skip),
                "pia_dim": config.pia_dim,
                "placement": config.placement,
                "accuracy": finalist.accuracy,
                "accuracy_low": finalist.accuracy_low,
                "accuracy_high": finalist.accuracy_high,
                **dict(zip(CHANGE, map(float, paired_difference(finalist.scores, baseline)), strict=True)),
                "selection_accuracy": finalist.selection_accuracy,
                "breakdown": finalist.breakdown,
                "accuracy_seeds": finalist.accuracy_seeds,
                **figures[finalist.number],
                "config": config.model_dump(mode="json"),
            }
        )
    front = pd.DataFrame(rows)
    paid = front[list(costs)].to_numpy(dtype=float)
    front["on_front"] = non_dominated(front["accuracy"].to_numpy(), paid)
    _, beyond = dominance([finalist.scores.double().numpy() for finalist in finalists], paid)
    unsure = np.where(beyond.any(axis=0), "dominated", "undecided")
    front["front"] = np.where(front["on_front"], "front", unsure)
    front["chosen"] = False
    return front.sort_values("latency").reset_index(drop=True)


def mark_chosen(
    front: pd.DataFrame, wanted: str, baseline: tuple[float, float], costs: Sequence[str] = COSTS
) -> pd.DataFrame:
    """Mark the preferred point in column `chosen`.

    Only accuracies on the *selection* samples are looked at, also for what is dominated, so that the chosen point's
    held-out figure is not the best of several. It may therefore be off the held-out front.

    Args:
        front: from `front_frame`.
        wanted: `knee` (largest bulge of the front), or `accuracy=F` for the fastest with at least F × the baseline's.
        baseline: selection accuracy of the adapter-only baseline, and its first cost.
        costs: columns that are minimised; the first one is weighed against accuracy.

    Raises:
        ConfigError: no finalist is accurate enough; names the best.
    """
    candidates = front[non_dominated(front["selection_accuracy"].to_numpy(), front[list(costs)].to_numpy(dtype=float))]
    accuracy, cost = candidates["selection_accuracy"].to_list(), candidates[costs[0]].to_list()
    if wanted == "knee":
        position = knee_point(accuracy, cost, baseline)
    else:
        position = prefer(accuracy, cost, float(wanted.partition("=")[2]) * baseline[0])
    marked = front.assign(chosen=False)
    marked.loc[candidates.index[position], "chosen"] = True
    return marked
