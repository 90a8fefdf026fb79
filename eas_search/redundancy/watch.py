"""What one-shot metrics look at: the residual stream around an attention and around its block, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite
from eas_search.architectures.calls import CallForm, call_form
from eas_search.parts import original_class
from eas_search.stand_ins import stand_in_input
from eas_search.supernet import Supernet


@dataclass
class Seen:
    """One site in the last forward pass.

    Attributes:
        x: the residual stream in front of the attention, [B, n, d].
        added: what the attention adds to it, [B, n, d].
        probe: zeros [B, n, d] added to `added`, so that ∂L/∂probe = ∂L/∂added even where nothing is trained; None
            without gradients.
        block_in, block_out: the stream in front of and behind the whole block.
        mask: which of the tokens are real, [B, n]; None: all.
    """

    x: Tensor
    added: Tensor
    probe: Tensor | None
    block_in: Tensor
    block_out: Tensor
    mask: Tensor | None

    def mean(self, values: Tensor) -> tuple[float, int]:
        """(sum, number) of per-token values [B, n] over the real tokens."""
        kept = values if self.mask is None or self.mask.shape != values.shape else values[self.mask.bool()]
        return float(kept.sum()), kept.numel()


class Watcher:
    """Hooks of one site; `seen` is filled by every forward pass that skips nothing."""

    def __init__(self, supernet: Supernet, site: AttentionSite, probing: bool) -> None:
        self.site, self.probing, self.host = site, probing, supernet.host(site)
        self.block = supernet.model.get_submodule(site.block)
        self.attention: Any = supernet.model.get_submodule(site.name)
        behind = site.pattern.writer or site.pattern.post_attention or site.pattern.attention
        self.writer = supernet.model.get_submodule(f"{site.block}.{behind}")
        # Where a sublayer is a module of its own (BERT, T5), what it is called with is the stream in front of it.
        self.sublayer = supernet.model.get_submodule(site.name.rpartition(".")[0])
        self.parts: dict[str, Any] = {}

    def attach(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Install the hooks."""
        return [
            self.block.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.sublayer.register_forward_pre_hook(self._approach, with_kwargs=True),
            self.attention.register_forward_pre_hook(self._attend, with_kwargs=True),
            self.writer.register_forward_hook(self._write),
            self.block.register_forward_hook(self._leave),
        ]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.parts = {"block_in": call_form(original_class(module)).first(args, kwargs)}

    def _approach(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.sublayer is not self.block:
            self.parts["approached"] = call_form(original_class(module)).first(args, kwargs)

    def _attend(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        form, pattern = call_form(original_class(module)), self.site.pattern
        self.parts["read"] = stand_in_input(form, self.site, args, kwargs)
        self.parts["adds"] = form.argument(pattern.adds, args, kwargs) if pattern.adds else None

    def _write(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        added = CallForm.unpack(output)
        self.parts["added"] = added if self.parts["adds"] is None else added - self.parts["adds"]
        if not self.probing:
            return None
        self.parts["probe"] = probe = torch.zeros_like(added, requires_grad=True)
        return (added + probe, *output[1:]) if isinstance(output, tuple) else added + probe

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.parts["block_out"] = CallForm.unpack(output)
        context = self.host.eas_context
        # An encoder-decoder's cross-attention pools over the other stream; its own tokens are the decoder's.
        self.parts["mask"] = context.mask if self.site.kind == "self" else None

    @property
    def seen(self) -> Seen:
        """What the last forward pass showed."""
        parts, site = self.parts, self.site
        if site.whole:
            x = parts["block_in"]
        elif "approached" in parts:
            x = parts["approached"]
        else:
            # Of a cross-attention inside the block only what it reads is visible: the stream itself behind a norm.
            x = parts["block_in"] if site.kind == "self" else parts["read"]
        return Seen(
            x.detach(),
            parts["added"].detach(),
            parts.get("probe"),
            parts["block_in"].detach(),
            parts["block_out"].detach(),
            parts["mask"],
        )


@contextmanager
def watching(supernet: Supernet, probing: bool = False) -> Iterator[list[Watcher]]:
    """Watch every site of the supernet, which skips nothing meanwhile, in eval mode.

    Args:
        supernet: its switches are left with nothing skipped.
        probing: whether gradients with respect to what the attentions add are wanted.
    """
    supernet.set_skips(())
    watchers = [Watcher(supernet, site, probing) for site in supernet.sites]
    handles = [handle for watcher in watchers for handle in watcher.attach()]
    training = supernet.model.training
    try:
        supernet.model.eval()
        yield watchers
    finally:
        supernet.model.train(training)
        for handle in handles:
            handle.remove()
