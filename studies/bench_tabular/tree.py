"""Scores of all skip sets of a stack at once: sets that agree on the first layers share what these layers compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.supernet import Supernet
from eas_search.tasks.scores import IGNORED


class Tree(nn.Module):
    """Stands for all layers of a decoder: walks through every combination of skipped and kept attentions.

    Bit i of a skip set's number is set when layer i is skipped, so there are 2^L of them. All sets together cost
    2^(L + 1) - 2 layers instead of L · 2^L.

    Attributes:
        right: bool [B, 2^L] after a forward pass: which samples every skip set answers exactly.
    """

    def __init__(self, supernet: Supernet, layers: nn.ModuleList, finish: nn.Module, free: int) -> None:
        super().__init__()
        self.hosts = [supernet.host(site) for site in supernet.sites if site.tower == "text"]
        assert [*layers] == self.hosts, "every layer of the stack is a switchable site"
        self.finish, self.first_free = finish, len(self.hosts) - free
        self.right = torch.empty(0)
        self.rows = self.columns = self.wanted = torch.empty(0)

    def expect(self, labels: Tensor) -> None:
        """The labels [B, n] of the next forward pass."""
        self.rows, columns = (labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        self.columns, self.wanted = columns, labels[:, 1:][self.rows, columns]
        assert len(set(self.rows.tolist())) == len(labels), "every sample has an answer"
        self.right = torch.zeros(len(labels), 2 ** (len(self.hosts) - self.first_free), dtype=torch.bool)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """Fill `right`; the returned stream is that of nothing skipped so far and means nothing."""
        self._walk(hidden_states, 0, 0, kwargs)
        return hidden_states

    def _walk(self, x: Tensor, depth: int, number: int, kwargs: dict[str, Any]) -> None:
        if depth == len(self.hosts):
            said = self.finish(x[self.rows, self.columns]).argmax(dim=-1)
            wrong = torch.zeros(len(x), dtype=torch.bool)
            wrong[self.rows[said != self.wanted]] = True
            self.right[:, number] = ~wrong
            return
        bit = 1 << max(0, depth - self.first_free)
        for skipping in (False, True) if depth >= self.first_free else (False,):
            self.hosts[depth].skipping = skipping
            self._walk(self.hosts[depth](x, **kwargs), depth + 1, number + bit * skipping, kwargs)

    def judged_only(self, ffn: nn.Module, value: Tensor) -> Tensor:
        """The FFN of the last layer, computed where an answer is judged; half of all layers evaluated are last ones."""
        out = torch.zeros_like(value)
        out[self.rows, self.columns] = ffn(value[self.rows, self.columns])
        return out


class JudgedFfn(nn.Module):
    """An FFN of which only the judged tokens are wanted."""

    def __init__(self, ffn: nn.Module, tree: Tree) -> None:
        super().__init__()
        self.ffn = ffn
        self.judge = tree.judged_only

    def forward(self, value: Tensor) -> Tensor:
        """[B, n, d] → [B, n, d], zero where nothing is judged."""
        return self.judge(self.ffn, value)


@contextmanager
def as_tree(supernet: Supernet, free: int) -> Iterator[Tree]:
    """Meanwhile a forward pass of the supernet's model, a LLaVA, walks through its decoder's last `free` layers."""
    model: Any = supernet.model
    decoder = model.model.language_model
    layers, last = decoder.layers, decoder.layers[-1]
    supernet.set_skips(())
    tree = Tree(supernet, layers, nn.Sequential(decoder.norm, model.lm_head), free)
    ffn = last.mlp
    try:
        decoder.layers, last.mlp = nn.ModuleList([tree]), JudgedFfn(ffn, tree)
        yield tree
    finally:
        decoder.layers, last.mlp = layers, ffn
        supernet.set_skips(())
