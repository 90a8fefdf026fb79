"""What a merged student costs, block by block: one whose blocks were all measured before is neither merged nor run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from eas_search.asked import first_alone
from eas_search.measures import kv_bytes_by_slot, parameter_count, per_token, prefill

_BLOCK = re.compile(r"([^\d.][^.]*\.)*\d+")  # an element of a list that lies in no other list
_IN_BLOCK = re.compile(r"([^\d.][^.]*\.)*\d+(\.|$)")
_OF_NO_EFFECT = {"training", "layer_idx"}

Costs = tuple[int, int, int]  # FLOPs, bytes of keys and values, parameters


@dataclass
class CostBook:
    """FLOPs, KV bytes and parameters of blocks by the structure of the student's: modules, shapes, numbers, switches.

    Attributes:
        measured: how many models were run.
    """

    measured: int = 0
    _known: dict[object, Costs] = field(default_factory=dict, repr=False)

    def costs(self, student: nn.Module, merge: Callable[[], nn.Module], inputs: Mapping[str, Tensor]) -> dict[str, int]:
        """`flops`, `kv_bytes` and `parameters` of the merged student, as the functions in `measures` give them.

        Args:
            student: whose structure decides that of the merged one.
            merge: gives the merged student; called only when something about it is not known.
            inputs: of the prefill.
        """
        shapes = tuple((name, tuple(tensor.shape)) for name, tensor in inputs.items())
        modules = dict(student.named_modules())
        blocks = {path: module for path, module in modules.items() if _BLOCK.fullmatch(path)}
        ends = _behind_last_attention(modules, blocks)
        keys: dict[str, object] = {
            path: (shapes, path.rpartition(".")[0], ends[path], structure(block.named_modules()))
            for path, block in blocks.items()
        }
        keys[""] = (shapes, tuple(blocks), structure(item for item in modules.items() if not _IN_BLOCK.match(item[0])))
        if not all(key in self._known for key in keys.values()):
            merged = merge()
            found = measure(merged, inputs, {path: merged.get_submodule(path) for path in blocks})
            self.measured += 1
            if found[""][1]:  # it is not known whose keys and values these are
                return _total(found.values(), inputs)
            self._known.update((key, found[path]) for path, key in keys.items())
        return _total((self._known[key] for key in keys.values()), inputs)


def _behind_last_attention(modules: Mapping[str, nn.Module], blocks: Iterable[str]) -> dict[str, int]:
    """By path: 0 for blocks that a prefill runs for its last token alone, see `asked`; -1 where it runs the FFN so.

    -2 in front of these.
    """
    found = dict[str, int]()
    for path in {path.rpartition(".")[0] for path in blocks}:
        first = first_alone(modules[path])
        for position, (name, _) in enumerate(modules[path].named_children()):
            found[f"{path}.{name}"] = max(-2, min(0, position - first))
    return found


def _total(costs: Iterable[Costs], inputs: Mapping[str, Tensor]) -> dict[str, int]:
    flops, held, parameters = (sum(column) for column in zip(*costs, strict=True))
    return {"flops": flops, "kv_bytes": per_token(held, inputs), "parameters": parameters}


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
        costs[path] = int(by_module.get(path, 0)), held, parameter_count(block)
    inside = [sum(column) for column in zip(*costs.values(), strict=True)] or [0, 0, 0]
    every = counter.get_total_flops(), sum(slots), parameter_count(model)
    flops, held, parameters = (total - part for total, part in zip(every, inside, strict=True))
    costs[""] = flops, held, parameters
    return costs
