"""A copied tree of modules is what `copy.deepcopy` makes of it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from eas_search.copying import copy_modules

COPIES = (copy.deepcopy, copy_modules)


class Scale(nn.Module):
    """Refers to another module of its tree, to a set, and to something that cannot tell who holds it."""

    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.other = [other]  # no submodule
        self.notes: dict[Any, Any] = {("a", 1): other, "again": None}
        self.notes["again"] = self.notes
        self.register_buffer("by", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


class OwnCopy(nn.Linear):
    """Says itself what its copy is."""

    def __deepcopy__(self, memo: dict[int, Any]) -> OwnCopy:
        return self


class OwnState(nn.Linear):
    """Leaves something out of its copies."""

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "left_out": True}


def tree() -> nn.Sequential:
    """Tied weights, a module in two places, a hook, a parametrisation, and modules that are copied in their own way."""
    first, second, twice = nn.Linear(3, 3), nn.Linear(3, 3), nn.LayerNorm(3)
    second.weight = first.weight
    model = nn.Sequential(first, twice, second, twice, Scale(first), OwnCopy(3, 3), OwnState(3, 3))
    model.append(parametrizations.orthogonal(nn.Linear(3, 3)))
    model[6].register_forward_hook(lambda module, args, out: out + 1)
    model[0].train(False)
    model[2].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("copied", COPIES)
def test_copy_computes_the_same_and_shares_only_what_is_shared(copied: Any) -> None:
    model = tree()
    twin = copied(model)
    x = torch.randn(2, 3)
    torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert [type(one) for one in twin.modules()] == [type(one) for one in model.modules()]
    assert [one.training for one in twin.modules()] == [one.training for one in model.modules()]
    assert twin[2].weight is twin[0].weight
    assert twin[1] is twin[3]
    assert twin[4].other[0] is twin[0]
    assert twin[4].notes["again"] is twin[4].notes
    assert twin[4].notes["a", 1] is twin[0]
    assert twin[5] is model[5]
    assert twin[6].left_out
    assert not hasattr(model[6], "left_out")
    grads = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert {name: parameter.requires_grad for name, parameter in twin.named_parameters()} == grads
    own = {id(tensor) for one in model if one is not model[5] for tensor in (*one.parameters(), *one.buffers())}
    theirs = {id(tensor) for one in twin if one is not model[5] for tensor in (*one.parameters(), *one.buffers())}
    assert not own & theirs


@pytest.mark.parametrize("copied", COPIES)
def test_what_is_done_to_the_copy_does_not_reach_the_model(copied: Any) -> None:
    model = tree()
    x = torch.randn(2, 3)
    before = model(x)
    twin = copied(model)
    twin[0].register_forward_hook(lambda module, args, out: out * 0)
    twin[1].register_buffer("more", torch.zeros(1))
    twin[6].register_forward_pre_hook(lambda module, args: (args[0] * 5,))
    twin[2].new = 1
    twin[4].notes.clear()
    with torch.no_grad():
        twin[1].weight.fill_(7.0)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)
    assert len(model[4].notes) == 2
    assert not hasattr(model[2], "new")


@pytest.mark.parametrize("copied", COPIES)
def test_the_memo_says_what_stands_for_an_object(copied: Any) -> None:
    model = tree()
    view = nn.Parameter(model[0].weight.detach(), requires_grad=False)
    other = nn.LayerNorm(3)
    twin = copied(model, {id(model[0].weight): view, id(model[1]): other})
    assert twin[0].weight is view
    assert twin[2].weight is view
    assert twin[1] is other
    assert twin[3] is other
