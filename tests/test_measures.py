"""Plain figures of a model, against counts by hand."""

import math

import pytest
import torch
from torch import nn

from eas_search.measures import accuracy_interval, kv_bytes_per_token, parameter_count, prefill_flops


@pytest.mark.parametrize(("right", "count"), [(0, 20), (7, 20), (20, 20), (431, 1000)])
def test_the_interval_is_wilsons(right: int, count: int) -> None:
    z, p = 1.959963984540054, right / count
    middle = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    value, low, high = accuracy_interval(torch.arange(count) < right)
    assert value == p
    assert low == pytest.approx(middle - half, abs=1e-9)
    assert high == pytest.approx(middle + half, abs=1e-9)


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
    ).eval()


def test_kv_bytes_are_keys_and_values_of_every_layer() -> None:
    inputs = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    assert kv_bytes_per_token(tiny_llama(), inputs) == 3 * 2 * (2 * 4) * 4  # layers × (k, v) × heads · width × float32


def test_tied_parameters_count_once() -> None:
    attention, ffn, norms = 16 * 16 * 2 + 16 * 8 * 2, 3 * 16 * 24, 2 * 16
    assert parameter_count(tiny_llama()) == 20 * 16 + 3 * (attention + ffn + norms) + 16


def test_flops_of_a_linear_layer() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 6, bias=False)

        def forward(self, x: torch.Tensor, use_cache: bool) -> torch.Tensor:
            return self.inner(x)

    assert prefill_flops(Wrapped(), {"x": torch.zeros(5, 8)}) == 2 * 5 * 8 * 6
