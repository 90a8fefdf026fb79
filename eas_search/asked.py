"""Behind the last attention a token is computed only where its logits are asked for.

What a block without attention makes of a token depends on that token alone, unless its PIA pools. Behind the last
attention that is computed, the other tokens of a prompt therefore reach nothing but their own logits. `generate` asks
for those of the last token (`logits_to_keep=1`), a loss for those in front of a label: blocks at the end of a stack
whose attentions are skipped then cost next to nothing in prefill and training, their FFNs included. The tokens that
are computed come out the same, up to the rounding of products of other shapes. The FFN behind that last attention is
spared the other tokens, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.masks import predicting

# With any of these a caller sees what all tokens are inside.
_OUTPUTS = ("output_hidden_states", "output_router_logits")


@dataclass(frozen=True)
class Asked:
    """Which tokens the end of a stack computes.

    Attributes:
        index: [T], their places among the B · n tokens of the pass.
        since: position of the first block that computes no others; the FFN of the one in front of it does not, either.
    """

    index: Tensor
    since: int

    def alone(self, x: Tensor, ffn: Callable[[Tensor], Tensor]) -> Tensor:
        """What `ffn` makes of the tokens asked for among x [B, n, d]; zeros for the others."""
        rows, index, made = self._made(x, ffn)
        return made.new_zeros(rows.shape).index_copy(0, index, made).view_as(x)

    def update(self, x: Tensor, block: Callable[[Tensor], Tensor]) -> Tensor:
        """x [B, n, d] with what `block` makes of the tokens asked for, [1, T, d], in their place."""
        rows, index, made = self._made(x, block)
        return rows.index_copy(0, index, made.to(x.dtype)).view_as(x)

    def _made(self, x: Tensor, part: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(x as rows [B · n, d], the places where it is, what `part` makes of the rows there [T, d])."""
        rows, index = x.flatten(0, 1), self.index.to(x.device)
        return rows, index, part(rows[index].unsqueeze(0)).squeeze(0)


class _Wish(threading.local):
    only_labelled = False


_WISH = _Wish()


@contextmanager
def only_labelled() -> Iterator[None]:
    """While active, a pass that is given labels need only compute the logits that predict them."""
    before, _WISH.only_labelled = _WISH.only_labelled, True
    try:
        yield
    finally:
        _WISH.only_labelled = before


def asked_of(model: Any, named: Mapping[str, Any]) -> int | Tensor | None:
    """What a call of the whole model asks for: the number of last tokens, or labels [B, n]; None: all tokens.

    Args:
        model: which is called.
        named: its arguments by name.
    """
    config = getattr(model, "config", None)
    if any(named.get(name) or (named.get(name) is None and getattr(config, name, False)) for name in _OUTPUTS):
        return None
    kept, labels = named.get("logits_to_keep"), named.get("labels")
    if isinstance(kept, int) and kept > 0:
        return kept
    if getattr(config, "is_encoder_decoder", False):  # what its labels stand beside are other tokens
        return None
    return labels if _WISH.only_labelled and isinstance(labels, Tensor) and labels.dim() == 2 else None


def places(asked: int | Tensor, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """[T], the places of the tokens asked for among B · n; None: all of them, or nobody knows.

    Args:
        asked: see `asked_of`.
        shape: (B, n).
        device: of the tokens.
    """
    rows, n = shape
    if isinstance(asked, int):
        if asked >= n:
            return None
        return torch.arange(rows * n, device=device).view(rows, n)[:, n - asked :].flatten()
    if tuple(asked.shape) != (rows, n):
        return None
    return predicting(asked).flatten().nonzero().flatten().to(device)


def first_alone(blocks: nn.Module) -> int:
    """Position in a list of blocks from which on all compute every token by itself; their number if none does.

    Blocks of a student know that of themselves. Of others nothing is known, nor of an FFN that is not understood.
    """
    every = list(blocks.children())
    alone = takewhile(lambda block: getattr(block, "computes_alone", False), reversed(every))
    return len(every) - len(list(alone))
