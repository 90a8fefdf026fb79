"""Short fine-tuning of whatever is trainable, and scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from eas_search.conditions import AS_IT_IS, Conditions, device_of
from eas_search.distillation import distilled_loss
from eas_search.exceptions import ConfigError
from eas_search.models.calling import without_cache
from eas_search.reuse import reusing

Teacher = Callable[[dict[str, Tensor]], Tensor]
# Per forward pass when samples are scored. Of more samples even a small model's activations leave a processor's cache:
# the demo takes 28 % longer with 200. The logits, 1 GiB in float32, are the largest tensor of a search.
SCORED_SAMPLES, SCORED_TOKENS, SCORED_LOGITS = 100, 2**14, 2**28


class FineTuneConfig(BaseModel):
    """How a model is fine-tuned: AdamW, linear warm-up over the first tenth, linear decay to zero.

    Attributes:
        steps: optimizer steps; 0 leaves the model as it is.
        batch_size: samples per step.
        passes: forward passes that share a step's samples; their gradients are averaged.
        learning_rate: peak learning rate.
        weight_decay: AdamW's.
        clip: largest norm of the gradient.
        distill: share of the loss that is KL(intact ‖ student), where there is an intact model to learn from; the
            rest is the task's loss.
        temperature: softens both predictions in that KL.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    steps: int = Field(default=100, ge=0)
    batch_size: int = Field(default=32, ge=1)
    passes: int = Field(default=1, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    distill: float = Field(default=0.0, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0)

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
    device = device_of(model)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def fine_tune(  # noqa: PLR0913  (what a caller may want to see or change of a step)
    model: nn.Module,
    split: Any,
    config: FineTuneConfig,
    seed: int,
    before_step: Callable[[int, nn.Module], None] | None = None,
    conditions: Conditions = AS_IT_IS,
    *,
    teacher: Teacher | None = None,
) -> list[float]:
    """Train the parameters of `model` that require gradients.

    Args:
        model: anything whose forward takes a batch with labels and returns `.loss`.
        split: an encoded training split.
        config: steps, batch size, learning rate.
        seed: decides the order of the samples; torch's global random state is not used by it.
        before_step: called with (step, model) before each forward pass, e.g. to draw a skip set.
        conditions: of every step.
        teacher: the intact model's logits for a batch, wanted where `config.distill` is set. It may be the same module
            tree: it is asked before `before_step`.

    Returns:
        The loss of every step.

    Raises:
        ConfigError: no samples, or nothing to distil from.
    """
    if config.distill and teacher is None:
        raise ConfigError(f"distill is {config.distill:g} where nothing is skipped; expected 0: no model to learn from")
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses: list[float] = []
    if not parameters or config.steps == 0:
        return losses
    # Many small adapters: one fused step takes a fraction of a step for each.
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, config.rate_at)
    batches = iter(endless(split, -(-config.batch_size // config.passes), torch.Generator().manual_seed(seed)))
    plain = without_cache(model)
    model.train()
    for step in range(config.steps):
        with conditions.guard(), reusing(model):
            optimizer.zero_grad(set_to_none=True)
            losses.append(0.0)
            for _ in range(config.passes):
                batch = on_device(next(batches), model)
                with conditions.forward(model):
                    intact = teacher(batch) if teacher is not None and config.distill else None
                    if before_step is not None:
                        before_step(step, model)
                    output = model(**batch, **plain)
                loss = output.loss / config.passes
                if intact is not None:
                    soft = distilled_loss(model, batch, output.logits, intact, config.temperature) / config.passes
                    loss = (1 - config.distill) * loss + config.distill * soft
                if loss.requires_grad:  # a skip set may leave no adapter in use
                    loss.backward()
                losses[-1] += loss.item()
            nn.utils.clip_grad_norm_(parameters, config.clip)
            optimizer.step()
            schedule.step()
    model.eval()
    return losses


@torch.no_grad()
def sample_scores(
    model: nn.Module, split: Any, batch_size: int | None = None, conditions: Conditions = AS_IT_IS
) -> Tensor:
    """Scores of all samples of an encoded split by the task's metric, [N], in the split's order, higher is better.

    They are bool where an answer is right or wrong, else floating point from 0 to 1. `batch_size` None: at most 100
    samples, fewer where texts are long or the vocabulary is large.
    """
    batch_size = batch_size or _scored_at_once(model, split.tokens)
    conditions = replace(conditions, labelled=conditions.labelled and split.scoring.labelled)
    model.eval()
    scores = []
    with reusing(model, prefixes=True):
        for inputs, extras in split.scored_batches(batch_size):
            with conditions.guard(), conditions.forward(model):
                scores.append(split.scoring.score(model, on_device(inputs, model), on_device(extras, model)).cpu())
    return torch.cat(scores)


def _scored_at_once(model: Any, tokens: int) -> int:
    """How many samples of `tokens` tokens fit into one forward pass."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    logits = tokens * int(getattr(text, "vocab_size", None) or 1)
    return max(1, min(SCORED_SAMPLES, SCORED_TOKENS // tokens, SCORED_LOGITS // logits))


@torch.no_grad()
def mean_loss(model: nn.Module, batch: dict[str, Tensor]) -> float:
    """Loss of one batch in eval mode; the model's mode is restored."""
    training = model.training
    model.eval()
    with reusing(model):
        loss = model(**on_device(batch, model), **without_cache(model)).loss.item()
    model.train(training)
    return loss
