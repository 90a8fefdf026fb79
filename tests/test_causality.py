"""No logit looks ahead: what a mean over tokens may and may not see.

"Exactly" means bit by bit: both passes have the same shapes, and a token that may not enter is multiplied by zero.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eas_search.skip_config import SkipConfig
from eas_search.skipping import apply_skips

PROMPT, TOTAL = 6, 10
FORMS = list(product(["prompt", "prefix", "none"], ["static", "routed"], ["ffn", "residual", "parallel"]))


@pytest.fixture(params=FORMS, ids="-".join)
def student(request: pytest.FixtureRequest, llama: Any, randomise: Callable[..., nn.Module]) -> Any:
    pooling, router, placement = request.param
    config = SkipConfig(
        skip=(0, 2), pia_dim=4, placement=placement, pooling=pooling, router=router, adapter_dim=4, temperature=1.0
    )
    return randomise(apply_skips(llama, config), std=0.5)


def changed(tokens: Tensor, position: int) -> Tensor:
    other = tokens.clone()
    other[:, position] = (other[:, position] + 17) % 60 + 3
    assert (other != tokens).sum() == len(tokens)
    return other


@torch.no_grad()
def logits(student: Any, tokens: Tensor, **inputs: Tensor) -> Tensor:
    return student(input_ids=tokens, use_cache=False, **inputs).logits


def labels_of(tokens: Tensor) -> Tensor:
    labels = tokens.clone()
    labels[:, :PROMPT] = -100
    return labels


@pytest.mark.parametrize("told_by", ["labels", "prompt_mask"])
def test_an_answer_token_changes_no_earlier_logit(student: Any, tokens: Tensor, told_by: str) -> None:
    mask = (torch.arange(TOTAL) < PROMPT).expand(len(tokens), -1)
    for position in range(PROMPT, TOTAL):
        before, after = (
            logits(student, ids, **({"labels": labels_of(ids)} if told_by == "labels" else {"prompt_mask": mask}))
            for ids in (tokens, changed(tokens, position))
        )
        assert torch.equal(before[:, :position], after[:, :position])
        assert (before[:, position:] - after[:, position:]).abs().amax(dim=(1, 2)).min() > 1e-3


def test_prefix_and_none_never_look_ahead_and_prompt_does_only_within_the_prompt(student: Any, tokens: Tensor) -> None:
    looks = student.eas.config.pooling == "prompt"
    mask = (torch.arange(TOTAL) < PROMPT).expand(len(tokens), -1)
    for position in range(TOTAL):
        before, after = (logits(student, ids, prompt_mask=mask) for ids in (tokens, changed(tokens, position)))
        ahead = (before[:, :position] - after[:, :position]).abs()
        if not looks or position >= PROMPT:
            assert not ahead.any()
        elif position > 0:
            assert ahead.max() > 1e-4  # otherwise this test would not see a look ahead either


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_content_of_padding_never_matters(student: Any, tokens: Tensor, side: str) -> None:
    """1e-5: the padded keys meet the softmax with weight zero, but in sums of another order."""
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, : (4 if side == "left" else 0)] = False
    real[1, (TOTAL if side == "left" else TOTAL - 4) :] = False
    real[2, 0 if side == "left" else -1] = False
    other = torch.where(real, tokens, (tokens + 23) % 57 + 3)
    first, second = (logits(student, ids, attention_mask=real.long()) for ids in (tokens, other))
    torch.testing.assert_close(first[real], second[real], atol=1e-5, rtol=0.0)


def test_padding_on_the_left_equals_the_bare_row(student: Any, tokens: Tensor) -> None:
    """2e-5: rotary angles differ by the shift only, but are rounded at other positions."""
    row = tokens[:1]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), row], dim=1)
    mask = (torch.arange(TOTAL + 3) >= 3).long().unsqueeze(0)
    alone, beside = logits(student, row), logits(student, padded, attention_mask=mask)
    torch.testing.assert_close(beside[:, 3:], alone, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("form", ["boolean", "additive"])
def test_a_four_dimensional_mask_means_the_same_as_its_row_of_padding(student: Any, tokens: Tensor, form: str) -> None:
    real = torch.ones_like(tokens, dtype=torch.bool)
    real[1, :4] = False
    square = torch.ones(TOTAL, TOTAL, dtype=torch.bool).tril() & real[:, None, None, :]
    if form == "additive":
        square = torch.where(square, 0.0, torch.finfo(torch.float32).min)
    flat, four = (logits(student, tokens, attention_mask=mask) for mask in (real.long(), square))
    torch.testing.assert_close(four[real], flat[real], atol=1e-5, rtol=0.0)
