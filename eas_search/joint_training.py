"""Joint training of a supernet's adapters under random skip sets, with the EAS bandit watching, and what follows it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from eas_search.bandit import EasBandit
from eas_search.redundancy import ONE_SHOT_METHODS
from eas_search.redundancy.bandit import bandit_step
from eas_search.settings import SupernetSettings
from eas_search.supernet import Supernet
from eas_search.training import endless, fine_tune
from eas_search.workbench import Workbench

Report = Callable[[str, int, int], None]


def train_jointly(bench: Workbench, supernet: Supernet, report: Report) -> list[float]:
    """Random skip sets in the warm-up; behind it the bandit draws them and learns from validation losses.

    Every step trains under another skip set: of `fixed_k` sites if the study fixes their number, else of any number.

    Returns:
        The bandit's scores.
    """
    settings, sites, k = bench.settings.supernet, bench.sites, bench.space.fixed_k
    steps = settings.training.steps
    bandit = EasBandit(len(sites), settings.bandit)
    generator = torch.Generator().manual_seed(bench.settings.seed + 1)
    batches = iter(endless(bench.splits["validation"], settings.bandit_batch, generator))
    placements = bench.space.choices.placements
    done = 0

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
        report("supernet", step + 1, steps)
        watch(step)
        chosen = bandit.draw(draw_size(len(sites), step / steps), generator, count=1)[0]
        placement = placements[int(torch.randint(len(placements), (1,), generator=generator))]
        supernet.set_skips((sites[i].index for i in chosen), placement)

    fine_tune(supernet.model, bench.splits["train"], settings.training, bench.settings.seed, before_step=before_step)
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
    return {name: metric(supernet, batches) for name, metric in ONE_SHOT_METHODS.items()}
