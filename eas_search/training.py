"""Short fine-tuning of whatever is trainable, and scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from eas_search.exceptions import ConfigError
from eas_search.models.calling import without_cache

Guard = Callable[[], AbstractContextManager[object]]
# Per forward pass when samples are scored; the logits, 1 GiB in float32, are the largest tensor of a search.
SCORED_TOKENS, SCORED_LOGITS = 2**14, 2**28


class FineTuneConfig(BaseModel):
    """How a model is fine-tuned: AdamW, linear warm-up over the first tenth, linear decay to zero.

    Attributes:
        steps: optimizer steps; 0 leaves the model as it is.
        batch_size: samples per step.
        learning_rate: peak learning rate.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=100, ge=0)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)

    def rate_at(self, step: int) -> float:
        """Learning rate of a step (from 0), as a fraction of the peak."""
        warm = max(1, self.steps // 10)
        return min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm + 1))


def endless(split: Any, batch_size: int, generator: torch.Generator) -> Iterable[dict[str, Tensor]]:
    """Shuffled batches of an encoded split for ever, pass after pass; the last incomplete batch of a pass is kept."""
    if len(split) == 0:
        raise ConfigError("the training split is empty; expected at least one example: check the task's data")
    while True:
        yield from split.batches(batch_size, generator)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from `seed`, without touching torch's random state outside."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def on_device(batch: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The batch where the model's first parameter is."""
    device = next(model.parameters()).device
    return {name: tensor.to(device) for name, tensor in batch.items()}


def fine_tune(
    model: nn.Module,
    split: Any,
    config: FineTuneConfig,
    seed: int,
    before_step: Callable[[int, nn.Module], None] | None = None,
    guard: Guard = nullcontext,
) -> list[float]:
    """Train the parameters of `model` that require gradients.

    Args:
        model: anything whose forward takes a batch with labels and returns `.loss`.
        split: an encoded training split.
        config: steps, batch size, learning rate.
        seed: decides the order of the samples; torch's global random state is not used by it.
        before_step: called with (step, model) before each step, e.g. to draw a skip set.
        guard: entered around every step, e.g. a lock shared with timing processes.

    Returns:
        The loss of every step.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses: list[float] = []
    if not parameters or config.steps == 0:
        return losses
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, config.rate_at)
    batches = iter(endless(split, config.batch_size, torch.Generator().manual_seed(seed)))
    plain = without_cache(model)
    model.train()
    for step in range(config.steps):
        with guard():
            if before_step is not None:
                before_step(step, model)
            loss = model(**on_device(next(batches), model), **plain).loss
            optimizer.zero_grad(set_to_none=True)
            if loss.requires_grad:  # a skip set may leave no adapter in use
                loss.backward()
                nn.utils.clip_grad_norm_(parameters, config.clip)
                optimizer.step()
            schedule.step()
            losses.append(loss.item())
    model.eval()
    return losses


@torch.no_grad()
def sample_scores(model: nn.Module, split: Any, batch_size: int | None = None, guard: Guard = nullcontext) -> Tensor:
    """Scores of all samples of an encoded split by the task's metric, [N], in the split's order, higher is better.

    They are bool where an answer is right or wrong, else floating point from 0 to 1. `batch_size` None: at most 200
    samples, fewer where texts are long or the vocabulary is large.
    """
    batch_size = batch_size or _scored_at_once(model, split.tokens)
    model.eval()
    scores = []
    for inputs, extras in split.scored_batches(batch_size):
        with guard():
            scores.append(split.scoring.score(model, on_device(inputs, model), on_device(extras, model)).cpu())
    return torch.cat(scores)


def _scored_at_once(model: Any, tokens: int) -> int:
    """How many samples of `tokens` tokens fit into one forward pass."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    logits = tokens * int(getattr(text, "vocab_size", None) or 1)
    return max(1, min(200, SCORED_TOKENS // tokens, SCORED_LOGITS // logits))


@torch.no_grad()
def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Loss of one batch in eval mode; the model's mode is restored."""
    training = model.training
    model.eval()
    loss = model(**on_device(batch, model), **without_cache(model)).loss.item()
    model.train(training)
    return loss
