"""Attention step by step: what torch's own computes, only while it is asked for, and only where it is faster."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_conditions import llama, tokens
from torch import Tensor, nn
from torch.nn import functional as F

from eas_search.conditions import Conditions
from eas_search.plain_attention import SHORT, all_short, plain, step_by_step

FUSED = F.scaled_dot_product_attention


@settings(deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    groups=st.integers(1, 3),
    mask=st.sampled_from(["none", "bool", "additive", "causal"]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 99),
)
def test_it_is_torch_s_in_double_precision(
    sizes: tuple[int, int, int], groups: int, mask: str, scale: float | None, seed: int
) -> None:
    n, m, width = sizes
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 2 * groups, n, width, dtype=torch.float64, generator=generator)
    key, value = (torch.randn(2, 2, m, width, dtype=torch.float64, generator=generator) for _ in range(2))
    seen = torch.rand(2, 1, n, m, generator=generator) < 0.6
    seen[..., 0] = True  # every query sees something
    masks = {"bool": seen, "additive": torch.randn(n, m, dtype=torch.float64, generator=generator)}
    options: dict[str, Any] = {"is_causal": mask == "causal", "scale": scale, "enable_gqa": groups > 1}
    found = plain(query, key, value, attn_mask=masks.get(mask), **options)
    expected = FUSED(query, key, value, attn_mask=masks.get(mask), **options)
    # Its softmax is of float32, as autocast would have it.
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_dropout_is_torch_s(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 4, 8)
    with step_by_step():
        torch.manual_seed(0)
        found = F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(found, FUSED(x, x, x, dropout_p=0.5))


def test_it_is_there_as_long_as_somebody_is_inside() -> None:
    inside, leave, seen = threading.Event(), threading.Event(), list[Any]()

    def other() -> None:
        with step_by_step():
            inside.set()
            leave.wait(10)
            seen.append(F.scaled_dot_product_attention)

    with step_by_step():
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(10)
        assert F.scaled_dot_product_attention is plain
    assert F.scaled_dot_product_attention is plain  # for the other thread
    leave.set()
    thread.join()
    assert seen == [plain]
    assert F.scaled_dot_product_attention is FUSED
    with pytest.raises(RuntimeError, match="inside"), step_by_step():
        raise RuntimeError("inside")
    assert F.scaled_dot_product_attention is FUSED


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("bf16", "wanted"), [(True, True), (True, False), (False, True)])
def test_it_is_for_bfloat16(bf16: bool, wanted: bool, grad: bool) -> None:
    model, conditions = llama(), Conditions(bf16=bf16, plain_attention=wanted)
    with torch.set_grad_enabled(grad), conditions.forward(model):
        assert (F.scaled_dot_product_attention is plain) == (bf16 and wanted)
        found = model(**tokens()).logits
    torch.testing.assert_close(found, model(**tokens()).logits, rtol=0.05, atol=0.02)


def test_who_is_short_is_measured_on_the_model() -> None:
    assert all_short(llama(), tokens(SHORT))
    assert not all_short(llama(), tokens(SHORT + 1))
    assert not all_short(llama(attn_implementation="eager"), tokens())  # nothing to replace


class TwoTowers(nn.Module):
    """A short text and a long image."""

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        for count in (input_ids.shape[1], SHORT + 1):
            x = torch.randn(1, 1, count, 4)
            F.scaled_dot_product_attention(x, x, x)
        return x


def test_the_longest_attention_counts() -> None:
    model = TwoTowers()
    model.register_parameter("one", nn.Parameter(torch.zeros(1)))
    assert not all_short(model, tokens())
