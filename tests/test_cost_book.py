"""Costs of known blocks added up, against running the whole model."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from eas_search.cost_book import CostBook
from eas_search.measures import kv_bytes_per_token, parameter_count, prefill_flops
from eas_search.merging import merge
from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips


def expected(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, int]:
    counts = {"flops": prefill_flops(model, inputs), "kv_bytes": kv_bytes_per_token(model, inputs)}
    return {**counts, "parameters": parameter_count(model)}


def test_every_skip_set_costs_what_running_it_says(llava: Any, image_prompt: dict[str, Tensor]) -> None:
    book = CostBook()
    towers = [(0,), (3,), (0, 1), (1, 2, 3), (0, 1, 2, 3), (4,), (2, 5), ()]  # from 4 on: the vision tower's
    for skip, dim, placement in itertools.product(towers, (0, 2, 4), ("parallel", "ffn")):
        student = apply_skips(llava, SkipConfig(skip=skip, pia_dim=dim, placement=placement, pooling="none"))
        merged = merge(student).eval()
        assert book.costs(student, lambda m=merged: m, image_prompt) == expected(merged, image_prompt)  # type: ignore[misc]
    # In every tower: kept, deleted, and for each rank and placement merged; in the text tower these also at its end.
    assert book.measured <= 20
    shorter = {name: value[:1] for name, value in image_prompt.items()}
    assert book.costs(llava, lambda: llava, shorter) == expected(llava, shorter)


@pytest.mark.parametrize("change", [{"pooling": "none"}, {"router": "routed"}, {"adapter_dim": 4}, {"pia_dim": 8}])
def test_what_a_student_is_made_of_decides_what_its_merged_form_costs(
    llama: Any, tokens: Tensor, change: dict[str, Any]
) -> None:
    book, inputs = CostBook(), {"input_ids": tokens}
    first = SkipConfig(skip=(1,), pia_dim=4, pooling="prompt")
    for config in (first, first.model_copy(update=change), first):
        student = apply_skips(llama, config)
        merged = merge(student).eval()
        assert book.costs(student, lambda m=merged: m, inputs) == expected(merged, inputs)  # type: ignore[misc]
    assert book.measured == 2
    book.costs(student, lambda: pytest.fail("merged although all is known"), inputs)


def test_layers_with_a_window_are_told_from_those_without() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(
        vocab_size=64, head_dim=8, num_hidden_layers=4, sliding_window=4, layer_types=kinds, **sizes
    )
    model: Any = Gemma3ForCausalLM(config).eval()
    inputs = {"input_ids": torch.ones(2, 12, dtype=torch.long)}
    book = CostBook()
    found = set()
    for size in range(5):
        for skip in itertools.combinations(range(4), size):
            student = apply_skips(model, SkipConfig(skip=skip, pia_dim=0, pooling="none")).eval()
            assert book.costs(student, lambda s=student: s, inputs) == expected(student, inputs)  # type: ignore[misc]
            found.add(book.costs(student, lambda s=student: s, inputs)["kv_bytes"])
    assert len(found) > 5  # a kept window holds less than a kept full layer
    assert book.measured < 6


def test_keys_that_belong_to_no_block_are_measured_every_time(llama: Any, tokens: Tensor) -> None:
    twin = copy.deepcopy(llama)
    for layer in twin.model.layers:
        layer.self_attn.layer_idx = np.int64(layer.self_attn.layer_idx)  # good as an index, yet no int
    book, inputs = CostBook(), {"input_ids": tokens}
    for skip in ((), (1,), (1, 2), ()):
        student = apply_skips(twin, SkipConfig(skip=skip, pia_dim=0, pooling="none")).eval()
        assert book.costs(student, lambda s=student: s, inputs) == expected(student, inputs)  # type: ignore[misc]
    assert book.measured == 4
