"""What the prefill of a model costs, block by block: a model whose blocks were all measured before is not run again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eas_search.measures import kv_bytes_by_slot, per_token, prefill

_BLOCK = re.compile(r"([^\d.][^.]*\.)*\d+")  # an element of a list that lies in no other list
_IN_BLOCK = re.compile(r"([^\d.][^.]*\.)*\d+(\.|$)")
_OF_NO_EFFECT = {"training", "layer_idx"}

Costs = tuple[int, int]  # FLOPs, bytes of keys and values


@dataclass
class CostBook:
    """FLOPs and KV bytes of blocks by their structure: modules, shapes of weights, numbers and switches.

    Attributes:
        measured: how many models were run.
    """

    measured: int = 0
    _known: dict[object, Costs] = field(default_factory=dict, repr=False)

    def prefill(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """`flops` and `kv_bytes` as `measures.prefill_flops` and `measures.kv_bytes_per_token` give them."""
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items())
        modules = dict(model.named_modules())
        blocks = {path: module for path, module in modules.items() if _BLOCK.fullmatch(path)}
        keys: dict[str, object] = {
            path: (shapes, path.rpartition(".")[0], structure(block.named_modules())) for path, block in blocks.items()
        }
        keys[""] = (shapes, tuple(blocks), structure(item for item in modules.items() if not _IN_BLOCK.match(item[0])))
        if not all(key in self._known for key in keys.values()):
            found = measure(model, inputs, blocks)
            self.measured += 1
            if found[""][1]:  # it is not known whose keys and values these are
                return _total(found.values(), inputs)
            self._known.update((key, found[path]) for path, key in keys.items())
        return _total((self._known[key] for key in keys.values()), inputs)


def _total(costs: Iterable[Costs], inputs: Mapping[str, Tensor]) -> dict[str, int]:
    flops, held = (sum(column) for column in zip(*costs, strict=True))
    return {"flops": flops, "kv_bytes": per_token(held, inputs)}


def structure(modules: Iterable[tuple[str, nn.Module]]) -> tuple[object, ...]:
    """All that decides what these modules cost, not what they hold."""
    found: list[object] = []
    for name, module in modules:
        weights = tuple((key, tuple(weight.shape)) for key, weight in module.named_parameters(recurse=False))
        marks = tuple(
            (key, value)
            for key, value in vars(module).items()
            if key not in _OF_NO_EFFECT and isinstance(value, bool | int | float | str)
        )
        found.append((name, type(module).__qualname__, weights, marks))
    return tuple(found)


@torch.no_grad()
def measure(model: nn.Module, inputs: Mapping[str, Tensor], blocks: Mapping[str, nn.Module]) -> dict[str, Costs]:
    """Costs by path of each block; '' for what is outside of them."""
    with FlopCounterMode(display=False) as counter:
        output = prefill(model, inputs)
    by_module: dict[str, Any] = {
        name.partition(".")[2]: sum(operations.values()) for name, operations in counter.get_flop_counts().items()
    }
    slots = kv_bytes_by_slot(output)
    costs: dict[str, Costs] = {}
    for path, block in blocks.items():
        layers = {index for part in block.modules() if isinstance(index := getattr(part, "layer_idx", None), int)}
        held = sum(slots[index] for index in layers if slots and index < len(slots))
        costs[path] = int(by_module.get(path, 0)), held
    inside = [sum(column) for column in zip(*costs.values(), strict=True)] or [0, 0]
    costs[""] = counter.get_total_flops() - inside[0], sum(slots) - inside[1]
    return costs
