"""What the metrics are given: a supernet and batches, and the forward passes that several of them look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eas_search.distillation import judged
from eas_search.exceptions import ConfigError
from eas_search.models.calling import without_cache
from eas_search.reuse import reusing
from eas_search.supernet import Supernet
from eas_search.training import on_device

Batches = Sequence[dict[str, Tensor]]


@dataclass(frozen=True)
class LeftOut:
    """What deleting one attention changes, by site.

    Attributes:
        loss: increase of the mean loss over the batches, nats per answer token.
        kl: KL(intact ‖ without the site), the mean over judged predictions, in nats.
    """

    loss: list[float]
    kl: list[float]


@dataclass
class Passes:
    """The model at work. A metric makes passes of its own, or asks for those that others look at, too.

    Attributes:
        supernet: switchable; every metric leaves it with nothing skipped.
        batches: with labels, as in training.
    """

    supernet: Supernet
    batches: Batches

    @cached_property
    def left_out(self) -> LeftOut:
        """Every site skipped alone: one pass per site and batch beside those of the intact model.

        Raises:
            ConfigError: the model's output has no loss or no logits.
        """
        supernet, sites = self.supernet, self.supernet.sites
        losses, kl, count = [0.0] * len(sites), [0.0] * len(sites), 0
        training = supernet.model.training
        supernet.model.eval()
        for batch in self.batches:
            loss, intact = self._judged(batch)
            count += len(intact)
            for position, site in enumerate(sites):
                other_loss, other = self._judged(batch, site.index)
                losses[position] += (other_loss - loss) / len(self.batches)
                kl[position] += float((intact.exp() * (intact - other)).nan_to_num(0.0).sum())
        supernet.set_skips(())
        supernet.model.train(training)
        return LeftOut(losses, [total / max(1, count) for total in kl])

    @torch.no_grad()
    def _judged(self, batch: dict[str, Tensor], *skip: int) -> tuple[float, Tensor]:
        """(loss, log-probabilities of the predictions that the task judges [predictions, classes], float32)."""
        model: Any = self.supernet.model
        self.supernet.set_skips(skip)
        moved = on_device(batch, model)
        with reusing(model, prefixes=True):
            output = model(**moved, **without_cache(model))
        if getattr(output, "logits", None) is None or getattr(output, "loss", None) is None:
            raise ConfigError(
                f"{type(output).__name__} has no loss or no logits to judge a left-out attention by; expected both, "
                "from batches with labels: choose another ranking, such as 'similarity'"
            )
        return output.loss.item(), F.log_softmax(output.logits[judged(model, moved, output.logits)].float(), dim=-1)
