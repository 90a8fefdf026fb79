"""The formulas of the placements, literally, against students: the intact model with substituted outputs."""

from __future__ import annotations

import re
from typing import Any

import torch
from checks import SINGLE, Case, NotApplicable, placements, randomised, skips, within
from reference import hooked, literal_delta, taken_apart
from torch import Tensor, nn
from watch import difference, outputs

from eas_search.architectures import AttentionSite
from eas_search.skipping import adapter_parameters, apply_skips

FORMS = (("residual", "noop"), ("parallel", "noop"), ("ffn", "paper"))


def adapters(student: nn.Module) -> dict[str, dict[str, Tensor]]:
    """Tensors of the student's only site: role (`stream`, `ffn`) → name → tensor."""
    found: dict[str, dict[str, Tensor]] = {}
    for path, value in adapter_parameters(student).items():
        matched = re.search(r"pia_(stream|ffn)\.(.*)", path)
        assert matched, path
        found.setdefault(matched[1], {})[matched[2]] = value.detach()
    return found


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What a module was called with."""
    value: Tensor = args[0] if args else next(iter(kwargs.values()))
    return value


def expected(case: Case, site: AttentionSite, student: nn.Module, pooling: str) -> dict[str, Tensor]:
    """The intact model's outputs with this site's attention (and FFN input) replaced by the formulas."""
    config, tensors, seen = student.eas.config, adapters(student), {}
    inside = [name for name in case.order if name.startswith(site.name + ".")]
    hooks: dict[str, Any] = {}
    if case.projection(site) not in case.order:
        raise NotApplicable(f"the output projection of {site.name} is not called as a module")

    def keep(key: str) -> Any:
        def hook(_: nn.Module, args: tuple, kwargs: dict, __: Any) -> None:
            seen.setdefault(key, first_input(args, kwargs))

        return hook

    def stream(_: nn.Module, __: tuple, ___: dict, output: Tensor) -> Tensor:
        if "stream" not in tensors:
            return output * 0.0
        x_hat, outer = seen["x_hat"], seen.get("outer", seen["x_hat"])
        # Some attentions turn [B, n, d] into [n, B, d] before or after they attend.
        if x_hat.dim() == 3 and outer.shape != x_hat.shape and torch.equal(outer.transpose(0, 1), x_hat):
            x_hat = outer
        delta = literal_delta(tensors["stream"], x_hat, pooling, seen.get("other"))
        turned = output.dim() == 3 and output.shape != delta.shape and output.shape == delta.transpose(0, 1).shape
        return delta.transpose(0, 1) if turned else delta.reshape(output.shape)

    whole = len(placements([site])) == 3
    if getattr(site, "kind", "self") == "cross":
        keys = [name for name in inside if re.match(r"k|.*kv|encoder", name.rpartition(".")[2])]
        if not keys:
            raise NotApplicable(f"the key projection of {site.name} was not found")
        hooks[keys[0]] = keep("other")
        queries = [name for name in inside if re.match(r"q", name.rpartition(".")[2])]
        hooks[(queries or inside)[0]] = keep("x_hat")
    elif whole:

        def norm1(_: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
            seen["x"], seen["x_hat"] = first_input(args, kwargs), output

        hooks[f"{site.block}.{site.pattern.norm1}"] = norm1
    else:
        hooks[inside[0]] = keep("x_hat")
        hooks[f"{site.name}#before"] = keep("outer")
    after = getattr(site.pattern, "post_attention", "") if whole else ""
    hooks[f"{site.block}.{after}" if after else case.projection(site)] = stream
    if config.placement != "residual":
        path = f"{site.block}.{site.pattern.norm2}"
        _, gain, shift = taken_apart(case.model.get_submodule(path), site.width)
        first, _, _ = taken_apart(case.model.get_submodule(f"{site.block}.{site.pattern.norm1}"), site.width)

        def norm2(_: nn.Module, __: tuple, ___: dict, output: Tensor) -> Tensor:
            identity = seen["x_hat"] if config.identity == "paper" else first(seen["x"])
            value = gain * (identity + literal_delta(tensors["ffn"], seen["x_hat"], pooling)) + shift
            return value.reshape(output.shape)  # OPT runs its FFN on flat tokens

        hooks[path + "#second"] = norm2
    return hooked(case.model, hooks, lambda: outputs(case.model, case.inputs))


def formula(case: Case) -> dict[str, Any]:
    """Every placement at every chosen site, with the mean over all tokens and the running mean."""
    worst: dict[str, float] = {}
    left_out = []
    for site in case.chosen():
        own = "decoder_input_ids" in case.inputs and site.causal  # a decoder's own tokens are an answer: no prompt
        for placement, identity in FORMS:
            if placement not in placements([site]):
                continue
            for pooling in ("prompt", "prefix") if site.causal and not own else ("prompt",):
                config = skips([site], pia_dim=8, placement=placement, identity=identity, pooling=pooling)
                student = randomised(apply_skips(case.model, config))
                literal = "prefix" if own or pooling == "prefix" else "all"
                if getattr(site, "flat", False):  # packed images have no batch dimension to pool over
                    literal = "none"
                try:
                    gap = difference(expected(case, site, student, literal), outputs(student, case.inputs))
                except NotApplicable as reason:
                    left_out.append(str(reason))
                    continue
                within(gap, SINGLE, f"formula of {site.name} ({placement}, {pooling})")
                worst[placement] = max(worst.get(placement, 0.0), gap)
    if not worst:
        raise NotApplicable(left_out[0] if left_out else "no site")
    return {**worst, "left_out": len(left_out)}
