"""`apply_skips`: from a model and a skip configuration to a student that shares the model's weights."""

from __future__ import annotations

import inspect
import types
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from transformers.generation.utils import GenerationMixin

from eas_search.architectures import AttentionSite, attention_sites, resolve_skip
from eas_search.architectures.surroundings import takes_tokens
from eas_search.blocks import skip_site
from eas_search.cache import fixed_means
from eas_search.context import TokenContext
from eas_search.copying import copy_modules
from eas_search.dispatch import change_class
from eas_search.exceptions import ConfigError
from eas_search.head import own_head
from eas_search.hooks import EnterStack, ForgetWish, LeaveStack, NotePrompt
from eas_search.lora import attach_lora
from eas_search.parts import SparingFfn, StudentPart, adapt_attention, become
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
    Running statistics stay what they are whatever mode the copy is in, see `FixedStatistics`.
    """
    memo: dict[int, Any] = {}
    for tensor in model.parameters():
        # A quantised weight is an object of its own kind that nobody trains: it is shared as it is.
        view = nn.Parameter(tensor.detach(), requires_grad=False) if tensor.is_floating_point() else tensor
        memo[id(tensor)] = view
    for buffer in model.buffers():
        memo[id(buffer)] = buffer
    twin = copy_modules(model, memo)
    for module in twin.modules():
        if not isinstance(module, FixedStatistics) and _has_statistics(module):
            change_class(module, _fixed_class(type(module)))  # type: ignore[arg-type]
            module.training = False
    return twin


class FixedStatistics(nn.Module):
    """A norm with running statistics that stays in eval mode while the modules around it are trained.

    Its statistics are those of the original model. A step in train mode would move them there and in all other
    students, and adapters that are kept without them would stand on another base when they are loaded.
    """

    def train(self, mode: bool = True) -> Self:
        """Its parts follow `mode`, itself it does not."""
        super().train(mode)
        self.training = False
        return self


def _has_statistics(module: nn.Module) -> bool:
    """Whether the module keeps running statistics, as torch's norms over a batch call them."""
    return any(module._buffers.get(name) is not None for name in ("running_mean", "running_var"))


@cache
def _fixed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a norm with fixed statistics, which is still an instance of `kind`."""
    return type(f"Fixed{kind.__name__}", (FixedStatistics, kind), {"__module__": __name__})


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
        # Where PIAs pool, the last of them may need every token, and what a prefill takes would depend on where it is.
        local = site.causal and touched and (context.pooling == "none" or config.pia_dim == 0)
        if local and hooked and site.whole and site.pattern.ffn != ".":
            become(student.get_submodule(f"{site.block}.{site.pattern.ffn}"), SparingFfn, site, context)
    own_context, cross = contexts.get("self") or TokenContext(pooling="none"), contexts.get("cross")
    student.register_forward_pre_hook(NotePrompt(own_context, members[0].tower), with_kwargs=True)
    if causal:
        student.register_forward_hook(ForgetWish(own_context), always_call=True)
    if not hooked:
        return
    blocks = members[0].block.rpartition(".")[0].removeprefix(stack).lstrip(".")
    module.register_forward_pre_hook(EnterStack(own_context, cross, blocks), with_kwargs=True)
    module.register_forward_hook(LeaveStack(own_context, cross), always_call=True)
    path = stack.split(".") if stack else []
    # A model of several towers often leaves the decoding to a part of it, which alone sees the whole prompt.
    for generating in [student.get_submodule(".".join(path[:end])) for end in range(len(path) + 1)] if causal else []:
        # The first stack counts: language comes before what else decodes.
        taken = getattr(vars(generating).get("generate"), "__func__", None) is _generate
        if hasattr(generating, "generate") and not taken:
            generating.eas_context = own_context  # type: ignore[assignment]
            generating.generate = types.MethodType(_generate, generating)  # type: ignore[assignment]


def _generate(self: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of the model's own class, with the prompt's length noted for passes that use no cache.

    Raises:
        ConfigError: the KV cache that it is to go on from holds the means of an earlier prompt.
    """
    own = type(self).generate
    call = {**dict(zip(list(inspect.signature(own).parameters)[1:], args, strict=False)), **kwargs}
    settings, past = call.get("generation_config"), call.get("past_key_values")
    # An assistant is asked again and again, each time with the tokens that were accepted behind the same prompt.
    if past is not None and fixed_means(past) and not getattr(settings, "is_assistant", False):
        raise ConfigError(
            f"pooling 'prompt' needs the whole prompt in one piece, got a cache of {int(past.get_seq_length())} "
            "earlier tokens; expected all tokens of the chat without past_key_values, or pooling 'prefix' or 'none'"
        )
    # A static cache makes `generate` compile the forward pass where it can; the hooks have not been proved under it.
    if settings is None:
        kwargs.setdefault("disable_compile", True)
    with self.eas_context.generating(_prompt_length(self, call)):
        return own(self, *args, **kwargs)


def _prompt_length(model: Any, call: dict[str, Any]) -> int | None:
    """Tokens of the prompt in a call of `generate`, by the names of its arguments; None: unknown."""
    names = ["inputs_embeds", "input_ids"]
    if getattr(model, "main_input_name", "") in names:
        names.append("inputs")
    tokens = next((call[name] for name in names if call.get(name) is not None), None)
    if tokens is not None:
        return int(tokens.shape[1])
    # The library's own `generate` then begins with one token.
    return 1 if type(model).generate is GenerationMixin.generate else None


def compute_all_tokens(student: nn.Module) -> None:
    """Let a student compute every token to the end of its stack, whatever it is asked for (see `asked`), in place."""
    for part in student.modules():
        if isinstance(part, StudentPart):
            part.eas_context.whole = True


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
