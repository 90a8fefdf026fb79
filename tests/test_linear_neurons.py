"""The gate with which a gated neuron is linear."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from eas_search.exceptions import UnsupportedModelError
from eas_search.folding import constant_gate


@pytest.mark.parametrize(
    ("activation", "formula"),
    [
        (nn.SiLU(), lambda x: x / (1 + math.exp(-x))),
        (nn.SiLU(inplace=True), lambda x: x / (1 + math.exp(-x))),
        (nn.GELU(), lambda x: x / 2 * (1 + math.erf(x / math.sqrt(2)))),
        (nn.ReLU(), lambda x: x),
    ],
)
def test_the_activation_is_one_at_the_gate(activation: nn.Module, formula: object) -> None:
    expected = brentq(lambda x: formula(x) - 1, 0.5, 2, xtol=1e-15)  # type: ignore[operator]
    assert constant_gate(activation) == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("activation", [nn.Tanh(), nn.Sigmoid(), torch.cos])
def test_no_gate_is_linear_where_one_is_out_of_reach(activation: object) -> None:
    with pytest.raises(UnsupportedModelError, match="never equals 1"):
        constant_gate(activation)  # type: ignore[arg-type]
