"""A study as tables: one row per trial, one row per finalist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from optuna.study import Study

from eas_search.architectures import AttentionSite
from eas_search.finalists import Finalist
from eas_search.report.front import knee_point, non_dominated, prefer
from eas_search.skip_config import SkipConfig

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
    "origin",
    "config",
)


def trials_frame(study: Study, names: Mapping[int, str] | None = None) -> pd.DataFrame:
    """One row per trial that is finished (COMPLETE or FAIL); figures of failed trials are NaN.

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
            "state": trial.state.name,
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
    """The completed trials that no other one dominates (accuracy up, latency down), fastest first."""
    trials = trials_frame(study)
    done = trials[trials["state"] == "COMPLETE"].astype({"accuracy": float, "latency": float})
    kept = non_dominated(done["accuracy"].to_numpy(), done["latency"].to_numpy())
    return done[kept].sort_values("latency").reset_index(drop=True)


def front_frame(
    finalists: Sequence[Finalist], figures: Mapping[int, Mapping[str, Any]], sites: Sequence[AttentionSite]
) -> pd.DataFrame:
    """One row per finalist with both objectives and their intervals, fastest first; nothing is chosen yet.

    The front is that of held-out accuracy and side-by-side latency.

    Args:
        finalists: re-trained configurations.
        figures: their latencies, by trial number.
        sites: all searchable sites.
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
                "validation_accuracy": finalist.validation_accuracy,
                "breakdown": finalist.breakdown,
                **figures[finalist.number],
                "config": config.model_dump(mode="json"),
            }
        )
    front = pd.DataFrame(rows)
    front["on_front"] = non_dominated(front["accuracy"].to_numpy(), front["latency"].to_numpy())
    front["chosen"] = False
    return front.sort_values("latency").reset_index(drop=True)


def mark_chosen(front: pd.DataFrame, wanted: str, baseline_accuracy: float) -> pd.DataFrame:
    """Mark the preferred point of the front in column `chosen`.

    The choice looks at *validation* accuracy, so that the chosen point's held-out figure is not the best of several.

    Args:
        front: from `front_frame`.
        wanted: `knee` (largest bulge of the front), or `accuracy=F` for the fastest with at least F × the baseline's.
        baseline_accuracy: validation accuracy of the adapter-only baseline.

    Raises:
        ConfigError: no point of the front is accurate enough; names the best.
    """
    candidates = front[front["on_front"]]
    accuracy, latency = candidates["validation_accuracy"].to_list(), candidates["latency"].to_list()
    if wanted == "knee":
        position = knee_point(accuracy, latency, (baseline_accuracy, 1.0))
    else:
        position = prefer(accuracy, latency, float(wanted.partition("=")[2]) * baseline_accuracy)
    marked = front.assign(chosen=False)
    marked.loc[candidates.index[position], "chosen"] = True
    return marked
