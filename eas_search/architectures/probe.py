"""The proof of a pattern on real inputs: a block recomposed from its declared parts must equal the block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from eas_search.architectures.calls import CallForm, call_form
from eas_search.architectures.recompose import ffn_of, run_ffn
from eas_search.architectures.sites import AttentionSite
from eas_search.exceptions import UnsupportedModelError


def prove_sites(
    model: nn.Module, sites: Sequence[AttentionSite], inputs: Mapping[str, Tensor], tolerance: float = 1e-5
) -> dict[str, float]:
    """Run `model` once on real inputs and recompose the block of every site that is declared as a whole.

    Returns:
        The largest relative difference per site name: max|y − recomposed| / max(1, max|y|). Sites of which only the
        attention is declared have nothing to recompose; what their deletion does is proved by `prove_deletion`.

    Raises:
        UnsupportedModelError: a block is not what its pattern declares (say, it scales its residuals), or a site was
            not reached by this forward pass.
    """
    seen: dict[str, dict[str, Tensor]] = {site.name: {} for site in sites}
    handles = []

    def keep(site: AttentionSite, part: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
            seen[site.name][part] = CallForm.unpack(output).detach()
            if part == "block" and site.whole:
                seen[site.name]["x"] = call_form(type(module)).first(args, kwargs).detach()

        return hook

    for site in sites:
        for part, path in (("block", site.block), ("attention", site.name)):
            module = model.get_submodule(path)
            handles.append(module.register_forward_hook(keep(site, part), with_kwargs=True))
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
        block = model.get_submodule(site.block)
        if not {"attention", "block"} <= set(seen[site.name]):
            raise UnsupportedModelError(
                f"{site.name} was not reached by the forward pass; expected inputs that run it: leave its tower out"
            )
        if not site.whole:
            continue
        differences[site.name] = _difference(block, site, seen[site.name])
        if not differences[site.name] <= tolerance:
            raise UnsupportedModelError(
                f"{type(block).__name__} ({site.block}) is not the pattern "
                f"{site.pattern.name!r}: recomposed from its parts it differs by {differences[site.name]:.2g} "
                f"(tolerance {tolerance:g}); declare a BlockPattern for it"
            )
    return differences


def _difference(block: nn.Module, site: AttentionSite, seen: dict[str, Tensor]) -> float:
    pattern, x = site.pattern, seen["x"]
    assert site.ffn is not None
    if seen["x"].shape != seen["attention"].shape:
        return float("inf")
    with torch.no_grad():
        added = seen["attention"]
        if pattern.post_attention:
            added = getattr(block, pattern.post_attention)(added)
        h = x + added
        v = getattr(block, pattern.norm2)(h if site.residual == "sequential" else x)
        result = run_ffn(ffn_of(block, pattern.ffn), site.ffn, v)
        if pattern.post_ffn:
            result = getattr(block, pattern.post_ffn)(result)
        recomposed = h + result
    size = max(1.0, seen["block"].abs().max().item())
    return (recomposed - seen["block"]).abs().max().item() / size
