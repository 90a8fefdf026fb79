"""The proof of a pattern: a block recomposed from its declared parts must equal the block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eas_search.architectures.sites import AttentionSite
from eas_search.exceptions import UnsupportedModelError


def prove_sites(
    model: nn.Module, sites: Sequence[AttentionSite], inputs: Mapping[str, Tensor], tolerance: float = 1e-5
) -> dict[str, float]:
    """Run `model` once on real inputs and recompose every site's block from its parts.

    Returns:
        The largest relative difference per site name: max|y − recomposed| / max(1, max|y|).

    Raises:
        UnsupportedModelError: a block is not what its pattern declares (say, it scales its residuals), or a site was
            not reached by this forward pass.
    """
    seen: dict[str, dict[str, Tensor]] = {site.block: {} for site in sites}
    handles = []

    def keep(block: str, part: str):  # type: ignore[no-untyped-def]
        def hook(_: nn.Module, args: tuple, output: object) -> None:
            value = output[0] if isinstance(output, tuple) else output
            seen[block][part] = value.detach()  # type: ignore[union-attr]
            if part == "block":
                seen[block]["x"] = args[0].detach()

        return hook

    for site in sites:
        block = model.get_submodule(site.block)
        handles.append(block.register_forward_hook(keep(site.block, "block")))
        attention = getattr(block, site.pattern.attention)
        handles.append(attention.register_forward_hook(keep(site.block, "attention")))
    training = model.training
    try:
        model.eval()
        with torch.no_grad():
            model(**inputs)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()

    differences = {}
    for site in sites:
        differences[site.name] = _difference(model.get_submodule(site.block), site, seen[site.block])
        if not differences[site.name] <= tolerance:
            raise UnsupportedModelError(
                f"{type(model.get_submodule(site.block)).__name__} ({site.block}) is not the pattern "
                f"{site.pattern.name!r}: recomposed from its parts it differs by {differences[site.name]:.2g} "
                f"(tolerance {tolerance:g}); declare a BlockPattern for it"
            )
    return differences


def _difference(block: nn.Module, site: AttentionSite, seen: dict[str, Tensor]) -> float:
    if not {"x", "attention", "block"} <= set(seen):
        return float("nan")
    with torch.no_grad():
        h = seen["x"] + seen["attention"]
        recomposed = h + getattr(block, site.pattern.ffn)(getattr(block, site.pattern.norm2)(h))
    size = max(1.0, seen["block"].abs().max().item())
    return (recomposed - seen["block"]).abs().max().item() / size
