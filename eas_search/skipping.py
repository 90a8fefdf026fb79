"""`apply_skips`: from a model and a skip configuration to a student that shares the model's weights."""

from __future__ import annotations

import types
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite, attention_sites, resolve_skip
from eas_search.architectures.surroundings import takes_tokens
from eas_search.blocks import skip_site
from eas_search.context import TokenContext
from eas_search.copying import copy_modules
from eas_search.exceptions import ConfigError
from eas_search.head import own_head
from eas_search.hooks import EnterStack, LeaveStack, NotePrompt
from eas_search.lora import attach_lora
from eas_search.parts import adapt_attention
from eas_search.skip_config import Pooling, SkipConfig

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class StudentInfo:
    """What a student knows of itself, at `student.eas`.

    Attributes:
        config: the skip configuration with which it was made.
        sites: all attention sites of the *original* model.
        skipped: those whose attention is gone.
        merged: whether its PIAs are folded into plain weights.
        thin: names of the sites whose merged PIA stays two thin products because nothing else would be exact.
    """

    config: SkipConfig
    sites: tuple[AttentionSite, ...]
    skipped: tuple[AttentionSite, ...]
    merged: bool = False
    thin: tuple[str, ...] = ()


def share_copy(model: Model) -> Model:
    """A new module tree over the same tensors: parameters are frozen views, buffers are the same objects.

    Nothing done to the copy's structure or to `requires_grad` reaches the original; ties between weights survive.
    """
    memo: dict[int, Any] = {}
    for tensor in model.parameters():
        # A quantised weight is an object of its own kind that nobody trains: it is shared as it is.
        view = nn.Parameter(tensor.detach(), requires_grad=False) if tensor.is_floating_point() else tensor
        memo[id(tensor)] = view
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    return copy_modules(model, memo)


def apply_skips(model: Model, config: SkipConfig, sites: Sequence[AttentionSite] | None = None) -> Model:
    """A student: `model` without the attentions that `config` skips, with PIAs and light adapters in place.

    The student shares the frozen weights; only the new adapters are trainable. `model` itself is untouched. Adapters
    start as exact no-ops: with `identity="noop"` the student then computes `model` with those attentions deleted.

    Args:
        model: a model with at least one attention site; not itself a student.
        config: which sites to skip and what to put in their place.
        sites: `attention_sites(model)`, where it is known already.

    Raises:
        ConfigError: a site that does not exist, or a pooling that a causal stack cannot have.
        UnsupportedModelError: a block or norm outside the declared patterns.
    """
    if hasattr(model, "eas"):
        raise ConfigError("the model is already a student; expected an original model: apply one configuration to it")
    every = tuple(attention_sites(model) if sites is None else sites)
    return _build(model, every, resolve_skip(config.skip, list(every)), config)


def apply_switches(model: Model, config: SkipConfig, switchable: Sequence[AttentionSite]) -> Model:
    """A student in which the attention of every `switchable` site can be turned off and on (see `SupernetBlock`).

    It has a light adapter *and* PIAs at these sites. Made for training and scoring: it does not decode with a cache.
    """
    return _build(model, tuple(attention_sites(model)), tuple(switchable), config, supernet=True)


def _build(
    model: Model,
    sites: tuple[AttentionSite, ...],
    chosen: tuple[AttentionSite, ...],
    config: SkipConfig,
    supernet: bool = False,
) -> Model:
    routed_adapters = config.adapter_dim > 0 and config.adapter == "light" and config.router == "routed"
    if config.pooling == "all" and any(site.causal for site in (sites if routed_adapters else chosen)):
        raise ConfigError(
            "pooling 'all' lets a decoder look ahead; expected 'prompt', 'prefix' or 'none' for causal sites"
        )
    student = share_copy(model)
    own_head(student)
    stacks: dict[str, list[AttentionSite]] = defaultdict(list)
    for site in sites:
        stacks[site.stack].append(site)
    for stack, members in stacks.items():
        _build_stack(student, stack, members, {site.index for site in chosen}, config, supernet)
    student.eas = StudentInfo(config, sites, chosen)  # type: ignore[assignment]
    return student


def stack_pooling(model: nn.Module, config: SkipConfig, sites: Sequence[AttentionSite]) -> Pooling:
    """The pooling of the sites of one kind in one stack.

    Only a decoder has a prompt: encoders pool over all their tokens (a text encoder over those so far if that is asked
    for), cross-attentions over those of the other stream, and a decoder behind an encoder, whose prompt is the
    encoder's input, over the tokens so far. Rows that are not samples (packed images, windows of one image) give no
    mean over a sample's tokens.
    """
    site = sites[0]
    if config.pooling == "none" or (site.kind == "self" and any(one.flat for one in sites)):
        return "none"
    if not site.causal:
        return "prefix" if config.pooling == "prefix" and site.tower == "text" and site.kind == "self" else "all"
    behind_encoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return "prefix" if behind_encoder and config.pooling == "prompt" else config.pooling


def _build_stack(
    student: nn.Module,
    stack: str,
    members: list[AttentionSite],
    chosen: set[int],
    config: SkipConfig,
    supernet: bool,
) -> None:
    """Skip the chosen sites of one stack, adapt the kept ones and install the hooks they need."""
    text = members[0].tower in ("text", "fusion")
    touched = any(site.index in chosen for site in members)
    # Light adapters follow the text tower's training; another tower gets them only when some of its sites are skipped.
    lora = config.adapter == "lora"
    towers = config.adapter_towers
    wanted = (text or (touched and not lora)) if towers is None else members[0].tower in towers
    adapted = config.adapter_dim > 0 and wanted
    if not adapted and not touched:
        return
    keeps_means = adapted and not lora and config.router == "routed" and config.pooling != "none"
    gone = set() if supernet else {site.index for site in members if site.index in chosen}
    own = [site for site in members if site.kind == "self"]
    crossing = [site for site in members if site.kind == "cross"]
    module = student.get_submodule(stack)
    hooked = takes_tokens(module)
    causal = [site for site in own if site.causal]
    contexts = {
        kind: TokenContext(
            pooling=stack_pooling(student, config, sites),
            skipped=frozenset(site.layer for site in causal if site.index in gone),
            stateful=frozenset(site.layer for site in causal if site.index not in gone and keeps_means),
            layers=1 + max(site.layer for site in members) if hooked else 0,
            spare_first=config.router_spares_first,
            causal=bool(causal),
            streams=members[0].tower == "fusion" and not causal,
        )
        for kind, sites in (("self", own), ("cross", crossing))
        if sites
    }
    for site in members:
        context = contexts[site.kind]
        if adapted and site.index not in gone and site.adaptable:
            if lora:
                attach_lora(student.get_submodule(site.name), site.qkv, config)
            elif site.whole or not supernet or site.index not in chosen:
                adapt_attention(student, site, config, context)
        if site.index in chosen:
            skip_site(student, site, config, context, supernet)
    own_context, cross = contexts.get("self") or TokenContext(pooling="none"), contexts.get("cross")
    student.register_forward_pre_hook(NotePrompt(own_context, members[0].tower != "vision"), with_kwargs=True)
    if not hooked:
        return
    module.register_forward_pre_hook(EnterStack(own_context, cross), with_kwargs=True)
    module.register_forward_hook(LeaveStack(own_context, cross), always_call=True)
    if hasattr(student, "generate") and causal:
        student.eas_context = own_context  # type: ignore[assignment]
        student.generate = types.MethodType(_generate, student)  # type: ignore[assignment]


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of the model's own class, with the prompt's length noted for passes that use no cache."""
    tokens = args[0] if args else kwargs.get("inputs_embeds", kwargs.get("input_ids", kwargs.get("inputs")))
    length = None if tokens is None else tokens.shape[1]
    # A static cache makes `generate` compile the forward pass where it can; the hooks have not been proved under it.
    if kwargs.get("generation_config") is None:
        kwargs.setdefault("disable_compile", True)
    with self.eas_context.generating(length):
        return type(self).generate(self, *args, **kwargs)


def adapter_parameters(student: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters of a student by name: its PIAs, the adapters of kept attentions, and a new head."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def load_adapters(student: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy kept values into the adapters of a student; the inverse of keeping `adapter_parameters`.

    Raises:
        ConfigError: the tensors belong to another configuration.
    """
    own = adapter_parameters(student)
    if own.keys() != tensors.keys():
        odd = sorted(own.keys() ^ tensors.keys())[0]
        raise ConfigError(f"kept adapters do not fit this search: {odd!r} is on one side only; use another --output")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
