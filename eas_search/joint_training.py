"""Joint training of a supernet's adapters under changing skip sets, with the EAS bandit watching, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from eas_search.bandit import EasBandit
from eas_search.redundancy import ONE_SHOT_METHODS, Passes
from eas_search.redundancy.bandit import bandit_step
from eas_search.reuse import reusing
from eas_search.setting_groups import SupernetSettings
from eas_search.supernet import Supernet
from eas_search.training import endless, fine_tune
from eas_search.workbench import Workbench

Report = Callable[[str, int, int], None]
Choice = TypeVar("Choice")


def train_jointly(bench: Workbench, supernet: Supernet, report: Report) -> list[float]:
    """Every forward pass trains another skip set, see `SupernetSettings.draws`, and the bandit watches.

    Skip sets are of `fixed_k` sites if the study fixes their number, else of any number.

    Returns:
        The bandit's scores.
    """
    settings, sites, k = bench.settings.supernet, bench.sites, bench.space.fixed_k
    steps = settings.training.steps
    bandit = EasBandit(len(sites), settings.bandit)
    generator = torch.Generator().manual_seed(bench.settings.seed + 1)
    batches = iter(endless(bench.splits["validation"], settings.bandit_batch, generator))
    placements = bench.space.choices.placements
    dims = [dim for dim in bench.space.choices.pia_dims if dim > 0]
    sandwich = settings.draws == "sandwich"
    training = settings.training.model_copy(update={"passes": 3} if sandwich else {})
    uniform = EasBandit(len(sites), settings.bandit)  # its scores stay 0
    done = passes = 0

    def draw_size(largest: int, share: float) -> int:
        size = int(torch.randint(1, max(2, largest + 1), (1,), generator=generator)) if k is None else k
        return settings.bandit.size_at(share, size)

    def watch(step: int) -> None:
        nonlocal done
        due, share = updates_due(settings, step), step / max(1, steps)
        while done < due:
            size = draw_size(len(sites) - 2, share)
            if bandit.can_draw(size):  # with few sites there may be no choice between that many skip sets
                bandit_step(bandit, supernet, next(batches), size, generator)
            done += 1

    def before_step(step: int, _: nn.Module) -> None:
        nonlocal passes
        report("supernet", step + 1, steps)
        watch(step)
        arms = bandit if settings.draws == "bandit" else uniform
        chosen = arms.draw(draw_size(len(sites), step / steps), generator, count=1)[0]
        if sandwich and k is None and passes % 3 < 2:
            chosen = tuple(range(len(sites))) if passes % 3 else ()
        passes += 1
        supernet.set_skips(
            (sites[i].index for i in chosen), pick(placements), pick(dims) if settings.nested and dims else None
        )

    def pick(choices: Sequence[Choice]) -> Choice:
        return choices[int(torch.randint(len(choices), (1,), generator=generator))]

    fine_tune(
        supernet.model,
        bench.splits["train"],
        training,
        bench.settings.seed,
        before_step=before_step,
        conditions=bench.conditions,
        teacher=supernet.intact_logits,
    )
    with bench.conditions.forward(supernet.model):
        watch(steps)
    supernet.set_skips(())
    return bandit.scores.tolist()


def updates_due(settings: SupernetSettings, done: int) -> int:
    """Updates of the bandit that belong before training step `done` (from 0; the number of steps: at the end)."""
    steps, updates = settings.training.steps, settings.bandit_updates
    if updates is None:
        return settings.bandit.updates_due(done, steps)
    warm = settings.bandit.warmup * steps
    if done < warm:
        return 0
    share = 1.0 if steps == 0 else (done - warm) / (steps - warm)
    return min(updates, math.floor(updates * share + 1e-9))


def one_shot_scores(bench: Workbench, supernet: Supernet) -> dict[str, list[float]]:
    """Scores of the sites by every one-shot metric, on the trained supernet and as many samples as a bandit's update.

    Where an attention is left out, its adapters stand in for it, as they do in a trial.
    """
    settings = bench.settings.supernet
    split = bench.splits["validation"].subset(settings.bandit_batch)
    batches = list(split.batches(min(settings.training.batch_size, settings.bandit_batch)))
    with reusing(supernet.model):
        passes = Passes(supernet, batches)
        return {name: metric(passes) for name, metric in ONE_SHOT_METHODS.items()}
