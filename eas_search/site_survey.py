"""What is known of a model's attention sites without its weights: structure, cost by formula, proof on a tiny twin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from eas_search.architectures import AttentionSite, attention_sites, refused_sites
from eas_search.costs import SiteCost, block_flops, refused_scores, site_cost
from eas_search.exceptions import UnsupportedModelError
from eas_search.twin_proof import prove_on_twin


@dataclass(frozen=True)
class SurveyedSite:
    """One site.

    Attributes:
        site: as found on the model; what its block computes as found on the twin, where it was proved there.
        cost: by formula; None where `uncounted` says why not.
        share: of the block's FLOPs, from 0 to 1.
        uncounted: why there is no cost.
        refused: why it cannot be skipped; '' when nothing is against it.
        unproved: why it is only declared so far; '' when it is proved or refused.
    """

    site: AttentionSite
    cost: SiteCost | None
    share: float | None
    uncounted: str = ""
    refused: str = ""
    unproved: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        site, cost = self.site, self.cost
        return {
            "index": site.index,
            "name": site.name,
            "tower": site.tower,
            "kind": site.kind,
            "pattern": site.pattern.name,
            "norms": norm_placement(site),
            "heads": cost and cost.heads.heads,
            "kv_heads": cost and cost.heads.kv_heads,
            "head_width": cost and cost.heads.key_width,
            "parameters": cost and cost.parameters,
            "block_flops_share": self.share,
            "placements": list(site.placements),
            "merge_refusal": site.merge_refusal,
            "refused": self.refused or None,
            "unproved": self.unproved or None,
        }


@dataclass(frozen=True)
class Survey:
    """All sites of a model, the attentions that are none, and the length at which shares were counted."""

    model: str
    sites: tuple[SurveyedSite, ...]
    refused: Mapping[str, str]
    context: int

    @property
    def sound(self) -> tuple[SurveyedSite, ...]:
        """Sites against which nothing is known."""
        return tuple(entry for entry in self.sites if not entry.refused)

    @property
    def verdict(self) -> str:
        """One or two sentences: how many sites can be skipped and merged, and how sure that is."""
        unproved = [entry for entry in self.sound if entry.unproved]
        merging = sum(entry.site.merge_refusal is None for entry in self.sound)
        out_of = f" of {len(self.sites)}" if len(self.sound) < len(self.sites) else ""
        first = (
            f"{len(self.sound)}{out_of} attentions can be skipped, {merging} of them can be merged into plain weights"
        )
        if not unproved:
            return f"{first}: proved on a tiny twin with random weights."
        how = "declared, not yet proved: proved when the weights are loaded"
        if len(unproved) == len(self.sound):
            return f"{first}: {how} ({unproved[0].unproved})."
        return (
            f"{first}: proved on a tiny twin with random weights, but {len(unproved)} of them only {how} "
            f"({unproved[0].site.name}: {unproved[0].unproved})."
        )

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.model,
            "verdict": self.verdict,
            "context": self.context,
            "sites": [entry.to_dict() for entry in self.sites],
            "refused": dict(self.refused),
        }


def survey(model: nn.Module, towers: Iterable[str] | None = None, context: int = 1024) -> Survey:
    """Survey `model`, of which only the class, the configuration and the shapes are read (it may be on meta).

    Args:
        model: a model of `transformers`.
        towers: `text`, `vision`, `audio`, any of them; None means all. Indexes stay those of the whole model.
        context: tokens per sample at which shares of FLOPs are counted.

    Raises:
        UnsupportedModelError: it has no attention that can be skipped.
        ConfigError: an unknown tower.
    """
    found = attention_sites(model, None if towers is None else list(towers))
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention that can be skipped in tower {' or '.join(towers or ())}; "
            "expected one that it has: leave --towers out to see all"
        )
    proof = prove_on_twin(model, found)
    if all(site.name in proof.refused for site in found):
        raise UnsupportedModelError(
            f"no attention of {type(model).__name__} can be skipped ({found[0].name}, on a tiny twin with random "
            f"weights: "
            f"{proof.refused[found[0].name]}); expected blocks whose attention stands alone: declare yours with "
            "register_pattern"
        )
    costs, others = _costs(model, found), refused_sites(model)
    entries = []
    for site in found:
        cost, uncounted = costs[site.name], ""
        share = None
        try:
            share = _share(model, site, costs, others, context)
        except UnsupportedModelError as error:
            uncounted = str(error)
        if (twin := proof.proved.get(site.name)) is not None:
            site = replace(  # noqa: PLW2901  (what numbers say wins)
                site, pattern=twin.pattern, residual=twin.residual, ffn=twin.ffn, merge_refusal=twin.merge_refusal
            )
        refused, unproved = proof.refused.get(site.name, ""), proof.unproved.get(site.name, "")
        known = cost if isinstance(cost, SiteCost) else None
        entries.append(SurveyedSite(site, known, share, uncounted, refused, unproved))
    return Survey(type(model).__name__, tuple(entries), others, context)


def _share(
    model: nn.Module,
    site: AttentionSite,
    costs: Mapping[str, SiteCost | str],
    refused: Iterable[str],
    tokens: int,
) -> float:
    """The site's share of the FLOPs of its block."""
    inside = f"{site.block}."
    scores = sum(refused_scores(model, name, tokens) for name in refused if name.startswith(inside))
    for name, cost in costs.items():
        if name.startswith(inside):
            if isinstance(cost, str):
                raise UnsupportedModelError(cost)
            scores += cost.heads.score_flops(cost.pairs(tokens))
    own = costs[site.name]
    assert isinstance(own, SiteCost)
    return own.flops(tokens) / (block_flops(model, site.block, tokens) + scores)


def _costs(model: nn.Module, sites: Iterable[AttentionSite]) -> dict[str, SiteCost | str]:
    """The cost of each site, or why it is not known."""
    costs: dict[str, SiteCost | str] = {}
    for site in sites:
        try:
            costs[site.name] = site_cost(model, site)
        except UnsupportedModelError as error:
            costs[site.name] = str(error)
    return costs


def norm_placement(site: AttentionSite) -> str:
    """Where the norms of a block stand, for tables: `pre`, `post`, `sandwich`, `parallel`, or `?` when unknown."""
    return "parallel" if site.whole and site.residual == "parallel" else site.pattern.norms
