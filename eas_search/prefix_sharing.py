"""Layers in front of the first changed block are not computed again: a trie of residual streams.

When samples are scored, the stream that enters a block is a function of what entered the stack and of the blocks in
front of it. Both are known by their contents here, so that a model that begins like one that was scored before goes on
from where the two part: bit for bit the same, because what is taken over came from the same operations on the same
batch.

It pays where blocks recur: adapters that nobody trains (closed-form starts, plain deletion), or no adapters in front of
the first skipped attention. Blocks with trained adapters are all different, and nothing is kept for them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.architectures.calls import call_form
from eas_search.architectures.resolve import PROVIDERS
from eas_search.exceptions import UnsupportedModelError
from eas_search.fingerprints import fingerprint
from eas_search.parts import StudentPart, original_class

Key = tuple[bytes, bytes]  # of what entered the stack, of the blocks since


@dataclass
class _State:
    stream: Tensor
    used: int  # by which model


@dataclass
class PrefixCache:
    """Residual streams by what led to them, shared by all copies of one model.

    Attributes:
        limit: bytes that the kept streams may take. When they are used up, streams that the last two models did not
            use make room; if there is none, nothing more is kept.
        lists: dotted paths of the lists of blocks that take part.
        why_not: why none does; '' when one does.
        held: bytes that the streams take.
        reused: blocks that were not computed.
        computed: blocks that were computed in passes that could have reused some.
        full: whether streams did not fit.
    """

    limit: int
    lists: tuple[str, ...] = ()
    why_not: str = ""
    held: int = 0
    reused: int = 0
    computed: int = 0
    full: bool = False
    _own: set[tuple[object, ...]] = field(default_factory=set, repr=False)
    _states: OrderedDict[Key, _State] = field(default_factory=OrderedDict, repr=False)
    _seen: dict[bytes, bytes] = field(default_factory=dict, repr=False)  # by block: the first stack that had it
    _models: int = field(default=0, repr=False)

    @classmethod
    def over(cls, model: nn.Module, lists: tuple[str, ...], limit: int) -> PrefixCache:
        """A cache for students of `model`, whose weights stay as they are as long as it is used."""
        reasons = {path: unshareable(model.get_submodule(path)) for path in lists}
        kept = tuple(path for path, reason in reasons.items() if not reason)
        why_not = "" if kept else next(iter(reasons.values()), "no list of blocks with attention")
        return cls(limit, kept, why_not, _own={_place(t) for t in (*model.parameters(), *model.buffers())})

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixCache:
        """Itself: students share it with their model."""
        return self

    @contextmanager
    def sharing(self, model: nn.Module) -> Iterator[None]:
        """Reuse and keep streams in the forward passes of `model`, which must not change inside."""
        self._models += 1
        passes = [_StackPass(self, model, path) for path in self.lists]
        try:
            yield
        finally:
            for one in passes:
                one.detach()
                for state in one.states:
                    self._seen.setdefault(state, one.whole)

    def give_up(self, reason: str) -> None:
        """Keep nothing from now on."""
        self.why_not, self.lists, self.held = reason, (), 0
        self._states.clear()

    def get(self, key: Key) -> Tensor | None:
        """A kept stream, which counts as used."""
        state = self._states.get(key)
        if state is None:
            return None
        state.used = self._models
        self._states.move_to_end(key)
        return state.stream

    def put(self, key: Key, stream: Tensor) -> None:
        """Keep a copy of a stream if there is room."""
        while self._states and self.held + stream.nbytes > self.limit:
            oldest = next(iter(self._states))
            if self._states[oldest].used >= self._models - 1:
                break
            self.held -= self._states.pop(oldest).stream.nbytes
        if self.held + stream.nbytes > self.limit:
            self.full = True
            return
        self._states[key] = _State(stream.clone(), self._models)
        self.held += stream.nbytes

    def recurs(self, state: bytes, frozen: bool, whole: bytes) -> bool:
        """Whether other stacks will have a block, known by `examine`, of the stack `whole`.

        They will if it holds nothing but the original model's weights, or if another one had it: a trained student
        that is scored twice says nothing about others.
        """
        return frozen or self._seen.get(state, whole) != whole

    def examine(self, block: nn.Module) -> tuple[bytes, bool]:
        """(digest of all that decides what a block computes, whether it holds nothing but the original's weights)."""
        parts = []
        for name, module in block.named_modules():
            config = vars(module).get("eas_config")
            # What else is skipped decides nothing here.
            settings = config and config.model_dump(exclude={"skip"})
            parts.append((name, type(module).__qualname__, getattr(module, "skipping", None), settings))
        # The original's tensors are known by their place in memory, where they stay; others by what they hold.
        tensors = [*block.parameters(), *block.buffers()]
        places = [_place(tensor) for tensor in tensors]
        foreign = [tensor for tensor, place in zip(tensors, places, strict=True) if place not in self._own]
        digest = _digest(parts, [place for place in places if place in self._own], fingerprint(foreign))
        return digest, not foreign


class _StackPass:
    """The blocks of one stack while a model is scored: those in front of the deepest known stream are passed over."""

    def __init__(self, cache: PrefixCache, model: nn.Module, path: str) -> None:
        self.cache = cache
        self.blocks: list[Any] = list(model.get_submodule(path).children())
        stack = model.get_submodule(path.rpartition(".")[0])
        self.contexts = {id(m.eas_context): m.eas_context for m in stack.modules() if isinstance(m, StudentPart)}
        examined = [cache.examine(block) for block in self.blocks]
        self.states = [state for state, _ in examined]
        self.whole = _digest(self.states)
        recurring = [cache.recurs(state, frozen, self.whole) for state, frozen in examined]
        # Of what is computed in front of each block; whether the stream that enters it is worth keeping.
        self.prefixes, self.kept = [b""], [False]
        for i, state in enumerate(self.states[:-1]):
            self.prefixes.append(_digest(self.prefixes[-1], state))
            self.kept.append(all(recurring[: i + 1]))
        self.entered: bytes | None = None
        self.start, self.stream, self.whole_until = 0, torch.empty(0), len(self.blocks)
        # Behind the student's own hook, which settles the masks of the pass.
        self.handle = stack.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.before = [block.__dict__.get("forward") for block in self.blocks]
        for i, block in enumerate(self.blocks):
            block.forward = partial(self._run, i, block.forward)

    def detach(self) -> None:
        """Leave the model as it was."""
        self.handle.remove()
        for block, before in zip(self.blocks, self.before, strict=True):
            del block.forward
            if before is not None:
                block.forward = before

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.entered, self.start = None, 0
        # Behind a block that computes only some tokens the stream is not what another student would go on from.
        firsts = [context.now.asked.since - 1 for context in self.contexts.values() if context.now.asked is not None]
        self.whole_until = min(firsts, default=len(self.blocks))
        if torch.is_grad_enabled() or module.training or not any(self.kept):
            return
        content = _content([args, kwargs, [context.mask for context in self.contexts.values()], _precision()])
        if content is None:
            return
        self.entered = _digest(content)
        # All of them, so that the whole path counts as used and none of it is thrown away before what lies behind.
        for i in range(1, len(self.blocks)):
            stream = self.cache.get((self.entered, self.prefixes[i]))
            if stream is not None:
                self.start, self.stream = i, stream

    def _run(self, i: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.entered is None:
            return forward(*args, **kwargs)
        form = call_form(original_class(self.blocks[i]))
        if i < self.start:
            self.cache.reused += 1
            return self.stream.clone() if i == 0 else form.first(args, kwargs)
        self.cache.computed += 1
        if self.start < i <= self.whole_until and self.kept[i]:
            self.cache.put((self.entered, self.prefixes[i]), form.first(args, kwargs))
        return forward(*args, **kwargs)


def unshareable(blocks: nn.Module) -> str:
    """Why the streams between these blocks say not all that later blocks need; '' when they do."""
    for block in blocks.children():
        name = type(block).__name__
        try:
            form = call_form(original_class(block))
        except UnsupportedModelError as error:
            return str(error)
        if form.returns is not None:
            return f"{name} returns more than the residual stream"
        if any(getattr(part, mark, False) for part in block.modules() for mark in PROVIDERS):
            return f"{name} makes something that other blocks use"
    return ""


def _place(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()


def _precision() -> list[str]:
    """In which precision matrix products are computed here, other than that of their arguments."""
    devices = ("cpu", "cuda", "mps")
    return [str(torch.get_autocast_dtype(one)) for one in devices if torch.is_autocast_enabled(one)]


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()


def _content(value: Any) -> Any:
    """What a call's arguments hold, as a value whose `repr` tells them apart; None when a pass cannot be shared."""
    if isinstance(value, Tensor):
        return fingerprint([value])
    if isinstance(value, list | tuple):
        found = [_content(one) for one in value]
        return None if any(one is None for one in found) else found
    if isinstance(value, dict):
        if value.get("past_key_values") is not None or value.get("use_cache") or value.get("output_hidden_states"):
            return None
        values = {str(name): _content(one) for name, one in value.items()}
        return None if any(one is None for one in values.values()) else values
    # Anything else (a cache, a mask object) may hold what its text does not say.
    return ("plain", value) if value is None or isinstance(value, bool | int | float | str) else None
