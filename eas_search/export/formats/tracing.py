"""The merged student as one graph, traced by `torch.export`: what the graph formats share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from eas_search.conditions import device_of
from eas_search.exceptions import UnsupportedModelError
from eas_search.export.formats.base import Format, Verdict
from eas_search.export.forms import Form, Inputs
from eas_search.models.calling import without_cache


class Prefill(nn.Module):
    """A model's forward pass without KV cache, from tensors in a fixed order to tensors in a fixed order."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names, self.options = model, names, without_cache(model)

    def outputs(self, *tensors: Tensor) -> dict[str, Tensor]:
        """By name, the logits or every tensor of a model without any."""
        output = self.model(**dict(zip(self.names, tensors, strict=True)), **self.options)
        if "logits" in output:
            return {"logits": output["logits"]}
        return {name: value for name, value in output.items() if isinstance(value, Tensor)}

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The values of `outputs`."""
        return tuple(self.outputs(*tensors).values())


class GraphFormat(Format):
    """A traced prefill. Sizes that the model's code fixes while it is traced stay fixed, and are recorded."""

    generates = False

    def plan(self, student: Any) -> Verdict:
        """Every student can be tried; that it worked is what verifying shows."""
        prompt = student.eas.config.pooling == "prompt"
        note = "; every token counts as prompt" if prompt and student.eas.config.pia_dim else ""
        return Verdict("exact", f"prefill only: no KV cache, no generate{note}")

    def cannot_be_asked(self, content: Mapping[str, Any], form: Form, inputs: Inputs) -> str | None:
        """Whether the inputs have sizes for which the graph was made."""
        for name, sizes in content["sizes"].items():
            for dim, (low, high) in enumerate(sizes):
                size = inputs[name].shape[dim]
                if size < low or (high is not None and size > high):
                    wanted = str(low) if low == high else f"{low} or more"
                    return f"{name} has size {size} along {dim}, traced for {wanted}"
        return super().cannot_be_asked(content, form, inputs)


def trace(merged: Any, prompts: Mapping[str, Tensor]) -> tuple[ExportedProgram, dict[str, Any]]:
    """(program, facts): names of inputs and outputs, and [low, high] of every input's sizes.

    Batch and tokens vary where the model's code allows it.

    Raises:
        UnsupportedModelError: the model cannot be traced.
    """
    names = list(prompts)
    tokens = prompts["input_ids"].shape if "input_ids" in prompts else None
    dims = [dict.fromkeys(range(2 if prompts[name].shape == tokens else 1), Dim.AUTO) for name in names]
    module = Prefill(merged, names)
    device = device_of(merged)
    values = tuple(prompts[name].to(device) for name in names)
    with torch.no_grad():
        outputs = list(module.outputs(*values))
    try:
        with torch.no_grad():
            program = torch.export.export(module, values, dynamic_shapes=(tuple(dims),))
    except Exception as error:  # tracing runs the model's own code, which may fail in any way
        reason = " ".join(str(error).split())[:160]
        raise UnsupportedModelError(
            f"{type(merged).__name__} cannot be traced by torch.export ({type(error).__name__}: {reason}); expected a "
            "model without data-dependent Python: choose another format"
        ) from error
    return program, {"inputs": names, "outputs": outputs, "sizes": _sizes(program, names)}


def _sizes(program: ExportedProgram, names: list[str]) -> dict[str, list[list[int | None]]]:
    placeholders = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found: dict[str, list[list[int | None]]] = {}
    for name, given in zip(names, program.graph_signature.user_inputs, strict=True):
        found[name] = []
        for size in placeholders[str(given)].meta["val"].shape:
            fixed = isinstance(size, int) or size.node.expr.is_number
            # torch.export proves a graph for sizes from 2 on and lets it run with 1; verifying shows whether it does.
            low = int(size) if fixed else int(program.range_constraints[size.node.expr].lower)
            found[name].append([low, low] if fixed else [low if low > 2 else 1, None])
    return found


class Graph(nn.Module):
    """A loaded graph, called like the model it was made from."""

    def __init__(self, run: Any, content: Mapping[str, Any]) -> None:
        super().__init__()
        self.run, self.inputs, self.outputs = run, content["inputs"], content["outputs"]

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name."""
        return dict(zip(self.outputs, self.run([inputs[name] for name in self.inputs]), strict=True))
