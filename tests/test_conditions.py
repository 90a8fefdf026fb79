"""Mixed precision: what it changes, what it leaves alone, and who decides."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from eas_search.conditions import Conditions, computes_in_bf16
from eas_search.settings import SearchSettings
from eas_search.training import FineTuneConfig, fine_tune
from eas_search.workbench import in_bf16


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes, **changes)).eval()


def tokens(count: int = 12, rows: int = 3) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(50, (rows, count), generator=torch.Generator().manual_seed(0))}


class Probe(nn.Module):
    """Notes how a forward pass multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.seen.append(y.dtype)
        return y


def test_matrix_products_are_in_bfloat16_and_weights_and_gradients_are_not() -> None:
    model = Probe()
    with Conditions(bf16=True).forward(model):
        loss = model(torch.randn(2, 4)).float().sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert model.seen == [torch.bfloat16]
    assert model.linear.weight.dtype == torch.float32
    assert model.linear.weight.grad is not None
    assert model.linear.weight.grad.dtype == torch.float32
    with Conditions().forward(model):
        model(torch.randn(2, 4))
    assert model.seen[-1] == torch.float32


def test_what_a_model_answers_is_of_full_precision() -> None:
    model = llama()
    with Conditions(bf16=True).forward(model), torch.no_grad():
        output = model(**tokens(), use_cache=True)
        assert output.logits.dtype == torch.float32
        more = model(input_ids=output.logits[:, -1:].argmax(dim=-1), past_key_values=output.past_key_values).logits
    expected = model(**tokens()).logits
    assert not torch.equal(output.logits, expected)
    torch.testing.assert_close(output.logits, expected, rtol=0.05, atol=0.02)
    assert more.shape == (3, 1, 50)
    assert not model._forward_hooks


def test_training_in_bfloat16_ends_near_training_in_float32() -> None:
    class Rows:
        def batches(self, size: int, generator: torch.Generator) -> Any:
            yield {**tokens(), "labels": tokens()["input_ids"]}

        def __len__(self) -> int:
            return 3

    start = llama()
    losses = {}
    for bf16 in (False, True):
        model = copy.deepcopy(start)
        config = FineTuneConfig(steps=20, learning_rate=3e-3)
        losses[bf16] = fine_tune(model, Rows(), config, seed=0, conditions=Conditions(bf16=bf16))
    assert losses[True] != losses[False]  # it was another arithmetic
    assert losses[False][-1] < 0.7 * losses[False][0]
    assert losses[True] == pytest.approx(losses[False], rel=0.03)  # bfloat16 keeps 8 bits


@pytest.mark.parametrize(
    ("choice", "able", "dtype", "expected"),
    [
        ("no", True, torch.float32, False),
        ("bf16", False, torch.float32, True),
        ("auto", True, torch.float32, True),
        ("auto", False, torch.float32, False),
        ("auto", True, torch.bfloat16, False),
    ],
)
def test_who_computes_in_bfloat16(
    choice: Any, able: bool, dtype: torch.dtype, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": able})
    assert computes_in_bf16(choice, nn.Linear(2, 2).to(dtype)) is expected


def test_a_study_goes_on_as_it_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, settings = nn.Linear(2, 2), SearchSettings()
    decided = []
    for able in (True, False):  # begun on a machine that multiplies bfloat16, resumed on one that does not
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda able=able: {"avx512_bf16": able})
        decided.append(in_bf16(settings, model, tmp_path))
    assert decided == [True, True]
    assert in_bf16(settings, model, None) is False
    assert in_bf16(SearchSettings(mixed_precision="no"), model, tmp_path) is False
