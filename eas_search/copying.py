"""Copies of module trees, as `copy.deepcopy` makes them, in a fraction of its time.

Every module holds ten containers for hooks, nearly all of them empty. A tree of two hundred modules has two thousand of
these, and `deepcopy` spends most of its time on them; a search copies its model several times per trial.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any, TypeVar

from torch import nn

Model = TypeVar("Model", bound=nn.Module)

_IMMUTABLE = frozenset({type(None), bool, int, float, str, bytes, type})
_CONTAINERS = frozenset({dict, OrderedDict, set})
_OWN_WAY = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__")


def copy_modules(model: Model, memo: dict[int, Any] | None = None) -> Model:
    """What `copy.deepcopy(model, memo)` returns.

    Args:
        model: any tree of modules; what a class says of its own copying is followed.
        memo: as `deepcopy`'s: id of an object → what stands for it in the copy.

    Raises:
        RuntimeError, TypeError: something in the tree cannot be copied, as from `deepcopy`.
    """
    memo = {} if memo is None else memo
    # All twins exist before the first is filled: modules refer to each other in any order.
    twins = [(one, _blank(one, memo)) for one in model.modules() if id(one) not in memo and _is_plain(type(one))]
    for module, twin in twins:
        twin.__dict__.update({name: _copied(value, memo) for name, value in module.__getstate__().items()})
    return copy.deepcopy(model, memo)


def _is_plain(kind: type) -> bool:
    """Whether modules of this class are copied attribute by attribute."""
    own = any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in _OWN_WAY)
    return not own and not hasattr(kind, "__deepcopy__")


def _blank(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    memo[id(module)] = twin = type(module).__new__(type(module))
    return twin


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind in _CONTAINERS and not value:
        memo[id(value)] = empty = kind()
        return empty
    if kind in (dict, OrderedDict) and all(type(key) in (str, int) for key in value):
        memo[id(value)] = twin = kind()
        twin.update({key: _copied(inner, memo) for key, inner in value.items()})
        return twin
    return copy.deepcopy(value, memo)
