"""The finals of a search: from its trials to re-trained, held-out scored and side-by-side timed finalists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from optuna.study import Study

from eas_search.exceptions import EasSearchError
from eas_search.finalists import Finalist, finalist_name, measure_finalists, prepare_finalist
from eas_search.racing import CHANGE, Candidates, choose_finalists, shrink
from eas_search.skip_config import SkipConfig
from eas_search.stage_folder import StageFolder
from eas_search.stages import baseline_scores
from eas_search.study.frames import front_frame, trials_frame
from eas_search.study.progress import Display
from eas_search.study.workers import Workers
from eas_search.supernet import Supernet
from eas_search.workbench import Workbench


@dataclass(frozen=True)
class Finals:
    """What the finals end with.

    Attributes:
        finalists: re-trained configurations.
        front: as a table, from `front_frame`; nothing is chosen yet.
        race: how they were chosen, `racing.Choice.record`.
    """

    finalists: list[Finalist]
    front: pd.DataFrame
    race: Mapping[str, int]


def hold_finals(
    study: Study, bench: Workbench, supernet: Supernet, stages: StageFolder, display: Display, pool: Workers
) -> Finals:
    """Choose the finalists on selection samples, train them again, score them on held-out ones and time them together.

    Raises:
        EasSearchError: no trial was completed.
    """
    trials = trials_frame(study, {site.index: site.name for site in bench.sites})
    # A configuration proposed twice has one result; it must not take two places.
    trials = trials[trials["state"] != "FAIL"].drop_duplicates(subset=["skip", "pia_dim", "placement"])
    done = trials[trials["state"] == "COMPLETE"]
    if done.empty:
        raise EasSearchError(
            "no trial was completed, so there is no front; expected at least one: raise --time-limit and run again"
        )
    candidates = shrunken_candidates(trials, bench)
    places = min(bench.settings.candidates, len(done))
    display.stage(f"Race: the {places} best trials on samples that the search has not seen")
    choice = choose_finalists(bench, supernet, stages, candidates)
    display.stage(f"Finalists: re-training {len(choice.rows)} configurations, timing them side by side")
    chosen = {int(done["number"].iloc[row]): candidates.configs[row] for row in choice.rows}
    if bench.settings.jobs > 1:
        undone = {number: config for number, config in chosen.items() if stages.read(finalist_name(config)) is None}
        pool.prepare_finalists(undone, lambda count: display.step("finalists", count, len(undone)))
    finalists = []
    for number, config in chosen.items():
        finalists.append(prepare_finalist(bench, supernet, stages, number, config))
        display.step("finalists", len(finalists), len(chosen))
    figures = measure_finalists(bench, finalists, stages)
    front = front_frame(finalists, figures, bench.sites, baseline_scores(stages), bench.settings.objectives[1:])
    return Finals(finalists, front, choice.record)


def shrunken_candidates(trials: pd.DataFrame, bench: Workbench) -> Candidates:
    """The completed trials with shrunken accuracies: what similar ones reach counts where their own samples are few.

    Trials that were stopped early tell about their like, too, by as much as they have seen, but are no candidates.

    Args:
        trials: rows of `trials_frame`, complete or stopped ones, a configuration each.
        bench: with the validation samples on which they were scored.
    """
    configs = [SkipConfig(**config) for config in trials["config"]]
    seen = trials["stopped_at"].astype(float).fillna(len(bench.splits["validation"]))
    shrunken, variance = shrink(bench.space, configs, trials["accuracy"].to_numpy(dtype=float), seen.to_numpy())
    rows = np.flatnonzero(trials["state"] == "COMPLETE").tolist()
    costs = trials[list(bench.settings.objectives[1:])].to_numpy(dtype=float)
    change = CHANGE if bench.settings.final.steps > bench.settings.trial.steps else 0.0
    return Candidates(configs, shrunken, variance, costs, change).at(rows)
