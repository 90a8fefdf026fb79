"""The peer: a search as one would write it by hand on Optuna, in memory, with the toolkit's parts for a trial."""

from __future__ import annotations

from collections.abc import Sequence

import optuna

from eas_search.merging import merge
from eas_search.objective import order_seed, trial_latency
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.supernet import Supernet
from eas_search.training import fine_tune, sample_scores
from eas_search.workbench import Workbench


def search(bench: Workbench, supernet: Supernet, configs: Sequence[SkipConfig]) -> list[list[float]]:
    """Try these configurations; returns [accuracy, latency] of each."""
    settings, space = bench.settings, bench.space

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        skip = tuple(site.index for site in bench.sites if trial.suggest_int(f"skip_{site.index}", 0, 1))
        rank = trial.suggest_categorical("pia_dim", space.choices.pia_dims)
        placement = trial.suggest_categorical("placement", space.choices.placements)
        config = space.student.model_copy(update={"skip": skip, "pia_dim": rank, "placement": placement})
        student = apply_skips(bench.model, config)
        supernet.inherit(student)
        seed = order_seed(settings.seed)
        train, validation, how = bench.splits["train"], bench.splits["validation"], bench.conditions
        fine_tune(student, train, settings.trial, seed, conditions=how, teacher=supernet.intact_logits)
        accuracy = sample_scores(student.eval(), validation, conditions=how).double().mean().item()
        merged = merge(student).eval()
        return accuracy, trial_latency(bench, lambda: merged, config)[0]

    study = optuna.create_study(directions=["maximize", "minimize"], sampler=optuna.samplers.RandomSampler(seed=0))
    for config in configs:
        bits = {f"skip_{site.index}": int(site.index in config.skip) for site in bench.sites}
        study.enqueue_trial({**bits, "pia_dim": config.pia_dim, "placement": config.placement})
    study.optimize(objective, n_trials=len(configs))
    return [trial.values for trial in study.trials]
