"""The part of a model that a break-even report is about: one stack of blocks and the head behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from eas_search.architectures import AttentionSite, attention_sites, refused_sites
from eas_search.costs import SiteCost, matrices, refused_scores, site_cost
from eas_search.exceptions import UnsupportedModelError
from eas_search.models.calling import last_logits


@dataclass(frozen=True)
class Stack:
    """The stack of a model's main tower, by formula.

    Attributes:
        model: of which only shapes are read.
        sites: its self-attentions, in the order of its blocks.
        costs: of the sites.
        blocks: paths of all its blocks, also of those without a site.
    """

    model: Any
    sites: tuple[AttentionSite, ...]
    costs: tuple[SiteCost, ...]
    blocks: tuple[str, ...]

    @property
    def causal(self) -> bool:
        """Whether it decodes."""
        return all(site.causal for site in self.sites)

    @property
    def text(self) -> Any:
        """The configuration of its tower."""
        config = self.model.config
        return config.get_text_config(decoder=True) if self.sites[0].tower == "text" else config

    def matrices(self) -> list[tuple[int, float]]:
        """(entries, share that one token uses) of the matrices of its blocks."""
        return [entry for path in self.blocks for entry in matrices(self.model.get_submodule(path), self.text)]

    def head(self) -> int:
        """Entries of the output projection, which a prefill runs on the last token alone."""
        module = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        return module.weight.numel() if module is not None else 0

    @property
    def spares(self) -> bool:
        """Whether blocks at its end, once their attentions are skipped, compute the last token only, see `asked`."""
        understood = all(site.causal and site.whole for site in self.sites)
        return understood and len(self.sites) == len(self.blocks) and bool(last_logits(self.model))

    def prefill_share(self, tokens: int) -> float:
        """The attentions' share of the FLOPs of a prefill, whatever the batch."""
        return sum(cost.flops(tokens) for cost in self.costs) / self._prefill_flops(tokens)

    def spared_share(self, tokens: int) -> float:
        """The share of a prefill's FLOPs that all blocks would save at the stack's end, beside their attentions."""
        if not self.spares:
            return 0.0
        per_token = self._flops_per_token() - sum(cost.flops_per_token for cost in self.costs)
        return per_token * (tokens - 1) / self._prefill_flops(tokens)

    def _flops_per_token(self) -> float:
        return sum(2 * entries * share for entries, share in self.matrices())

    def _prefill_flops(self, tokens: int) -> float:
        scores = sum(cost.heads.score_flops(cost.pairs(tokens)) for cost in self.costs)
        refused = [name for name in refused_sites(self.model) if name.startswith(tuple(f"{b}." for b in self.blocks))]
        scores += sum(refused_scores(self.model, name, tokens) for name in refused)
        return self._flops_per_token() * tokens + scores + 2 * self.head()

    def decode_share(self, tokens: int, batch: int, itemsize: int) -> float:
        """The attentions' share of the bytes that one decode step reads: matrices once, the cache of every sample."""
        cache = batch * self.kv_bytes(tokens, itemsize)
        attention = sum(cost.entries for cost in self.costs) * itemsize + cache
        rest = sum(entries * min(1.0, share * batch) for entries, share in self.matrices()) + self.head()
        return attention / (rest * itemsize + cache)

    def kv_bytes(self, tokens: int, itemsize: int) -> int:
        """Bytes in the KV cache of one sample."""
        return sum(cost.kv_numbers(tokens) for cost in self.costs) * itemsize


def main_stack(model: nn.Module) -> Stack:
    """The stack whose attentions are skipped: the text tower's, or that of the only tower.

    Raises:
        UnsupportedModelError: there is not one stack of self-attentions, or its costs cannot be counted.
    """
    sites = attention_sites(model)
    tower = sites[0].tower
    own = [site for site in sites if site.tower == tower and site.kind == "self"]
    stacks = {site.stack for site in own if site.causal} or {site.stack for site in own}
    if len(stacks) != 1 or getattr(model.config, "is_encoder_decoder", False):
        listed = ", ".join(sorted({site.stack or "the model itself" for site in own})) or "none"
        raise UnsupportedModelError(
            f"{type(model).__name__} has several stacks of blocks ({listed}); expected one decoder or one encoder: its "
            "break-even is not reported, `eas-search sites` without --break-even works"
        )
    own = [site for site in own if site.stack in stacks]
    parent = own[0].block.rpartition(".")[0]
    blocks = tuple(f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children())
    return Stack(model, tuple(own), tuple(site_cost(model, site) for site in own), blocks)
