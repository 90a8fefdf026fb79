"""Learning from the intact model: the loss against written-out sums, and what a fine-tune does with it."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from eas_search.architectures import attention_sites
from eas_search.distillation import distilled_loss, judged
from eas_search.exceptions import ConfigError
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips
from eas_search.supernet import Supernet
from eas_search.training import FineTuneConfig, fine_tune


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_the_kl_of_the_intact_predictions(temperature: float) -> None:
    """Two classes' rows, written out: T² · Σ p log(p / q), mean over the rows."""
    teacher, student = [[2.0, 0.0, -1.0], [0.5, 0.5, 3.0]], [[0.0, 1.0, 0.0], [0.5, 1.5, 2.0]]
    expected = 0.0
    for mine, theirs in zip(student, teacher, strict=True):
        p, q = (softmax([value / temperature for value in row]) for row in (theirs, mine))
        expected += temperature**2 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2
    model: Any = SimpleNamespace(eas=SimpleNamespace(sites=()))
    batch = {"labels": torch.tensor([0, 2])}
    actual = distilled_loss(model, batch, torch.tensor(student), torch.tensor(teacher), temperature)
    assert actual.item() == pytest.approx(expected, rel=1e-5)


def test_a_decoder_is_judged_where_it_predicts_an_answer(llama: Any) -> None:
    """The logits of a token speak of the next one: of answer tokens 3 and 4 those at 2 and 3 do."""
    student = apply_skips(llama, SkipConfig(skip=(1,), pia_dim=4))
    labels = torch.tensor([[-100, -100, -100, 7, 8, -100]])
    rows = judged(student, {"labels": labels}, torch.zeros(1, 6, 64))
    assert rows.tolist() == [[False, False, True, True, False, False]]
    assert judged(student, {"labels": torch.tensor([3])}, torch.zeros(1, 5)).tolist() == [True]


class Rows:
    """The same batch for ever, in parts."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def batches(self, batch_size: int, generator: torch.Generator | None = None) -> Any:
        yield from (
            {n: v[i : i + batch_size] for n, v in self.tensors.items()} for i in range(0, len(self), batch_size)
        )


class Linear(nn.Module):
    """Class logits W x with the usual loss."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 4))
        self.seen: list[int] = []

    def forward(self, x: Tensor, labels: Tensor) -> Any:
        self.seen.append(len(x))
        logits = x @ self.weight.T
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def linear_rows() -> Rows:
    generator = torch.Generator().manual_seed(0)
    return Rows(x=torch.randn(12, 4, generator=generator), labels=torch.arange(12) % 3)


def test_passes_share_a_step_and_average_their_gradients() -> None:
    """Equal parts of a batch: the mean of their gradients is that of the whole."""
    models = {passes: Linear() for passes in (1, 3)}
    losses = {
        passes: fine_tune(model, linear_rows(), FineTuneConfig(steps=4, batch_size=12, passes=passes), seed=0)
        for passes, model in models.items()
    }
    assert models[3].seen == [4] * 12
    assert models[1].seen == [12] * 4
    torch.testing.assert_close(models[3].weight, models[1].weight)
    assert losses[3] == pytest.approx(losses[1], rel=1e-5)


def test_a_fine_tune_mixes_both_losses() -> None:
    """With all weight on the KL the labels do not matter; the first loss is the mixture, written out."""
    teacher = torch.tensor([[1.0, 0.0, 0.0]]).expand(12, -1) * 2.0
    model, rows = Linear(), linear_rows()
    config = FineTuneConfig(steps=1, batch_size=12, distill=0.25)
    losses = fine_tune(model, rows, config, seed=0, teacher=lambda batch: teacher)
    p = softmax([2.0, 0.0, 0.0])
    kl = sum(value * math.log(value / (1 / 3)) for value in p)  # the student starts with equal logits
    assert losses[0] == pytest.approx(0.75 * math.log(3) + 0.25 * kl, rel=1e-5)
    models = []
    for labels in (rows.tensors["labels"], 2 - rows.tensors["labels"]):
        models.append(Linear())
        changed = Rows(x=rows.tensors["x"], labels=labels)
        only = FineTuneConfig(steps=5, batch_size=12, distill=1.0)
        fine_tune(models[-1], changed, only, seed=0, teacher=lambda batch: teacher)
    assert torch.equal(models[0].weight, models[1].weight)
    assert models[0].weight.abs().max() > 0


def test_distilling_needs_a_teacher() -> None:
    with pytest.raises(ConfigError, match=r"distill is 0\.5 where nothing is skipped"):
        fine_tune(Linear(), linear_rows(), FineTuneConfig(distill=0.5), seed=0)
    with pytest.raises(ValidationError):
        FineTuneConfig(distill=1.5)


def test_the_teacher_is_the_supernet_without_skips(llama: Any, tokens: Tensor, randomise: Any) -> None:
    """Whatever is skipped at the moment and in whatever mode, and a student comes nearer to it by distillation."""
    supernet = Supernet(llama, attention_sites(llama), SkipConfig(pia_dim=8, pooling="prompt", adapter_dim=4))
    randomise(supernet.model, std=0.1)
    adapted = apply_skips(llama, SkipConfig(pooling="prompt", adapter_dim=4)).eval()
    supernet.inherit(adapted)
    supernet.set_skips((1, 2))
    supernet.model.train()
    labels = tokens.clone()
    labels[:, :6] = -100
    batch = {"input_ids": tokens, "labels": labels}
    with torch.no_grad():
        expected = adapted(**batch, use_cache=False).logits
    assert torch.equal(supernet.intact_logits(batch), expected)
    assert supernet.model.training
    student = apply_skips(llama, supernet.config.model_copy(update={"skip": (1, 2)}))
    config = FineTuneConfig(steps=30, batch_size=4, distill=1.0, learning_rate=1e-2)
    losses = fine_tune(student, Rows(**batch), config, seed=0, teacher=supernet.intact_logits)
    assert losses[-1] < 0.5 * losses[0]
