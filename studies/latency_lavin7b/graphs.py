"""A pass captured as a CUDA graph, so that the launches of its kernels cost next to nothing.

Captured are the text tower and the output layer on given embeddings: looking up images asks the device how many there
are, which a graph cannot. A decode graph repeats one step on one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WARMUPS = 3


class Replay(nn.Module):
    """Calling it replays the captured `run`; `owner` holds the weights, `kept` whatever else the graph reads."""

    def __init__(self, run: Callable[[], object], owner: nn.Module, kept: object = None) -> None:
        super().__init__()
        self.owner, self.kept = owner, kept
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUPS):
                run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = run()

    def forward(self, **inputs: Any) -> None:
        """Inputs are those of the capture, whatever is given."""
        self.graph.replay()


def prefill_graph(model: Any, embeds: Tensor) -> Replay:
    """Of a prompt batch [B, n, d]."""
    return Replay(lambda: model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).logits, model)


def decode_graph(model: Any, embeds: Tensor) -> Replay:
    """Of the first step after a prompt batch [B, n, d]."""
    caches = [model(inputs_embeds=embeds, use_cache=True, logits_to_keep=1).past_key_values for _ in range(WARMUPS + 1)]
    # A step puts longer keys in the cache's place; the graph goes on reading those that were there.
    layers = [layer for cache in caches for layer in cache.layers]
    tensors = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in layers]
    waiting, token = iter(caches), embeds[:, -1:].contiguous()

    def step() -> Tensor:
        logits: Tensor = model(inputs_embeds=token, past_key_values=next(waiting), logits_to_keep=1).logits
        return logits

    return Replay(step, model, (caches, tensors))


def captured(
    models: Mapping[str, Any], embeds: Tensor, capture: Callable[[Any, Tensor], Replay]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """(replays, reasons) by name: what cannot be captured is not measured, and the reason says why."""
    found: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    with torch.inference_mode():
        for name, model in models.items():
            try:
                found[name] = capture(model, embeds)
            except RuntimeError as error:
                refused[name] = str(error).splitlines()[0]
    return found, refused
