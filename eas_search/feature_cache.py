"""Image features computed once per image, for models whose vision side no student changes.

A multimodal model of `transformers` makes the features of its images in `get_image_features` (vision tower and
connector), which sees nothing but pixels. While the cache is open, images that were seen before are not encoded again.
They are known by their contents: neither the order of the samples, nor how they are batched and padded, matters.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.fingerprints import fingerprints

METHOD = "get_image_features"
# Images that are encoded together, always as many: a matrix product of another size is rounded differently, and what
# an image's features are must not depend on which images were known before.
ENCODED_TOGETHER = 16
_OBSERVED = {"last_hidden_state", "hidden_states", "attentions", "pooler_output"}
Row = dict[str, Tensor]


@dataclass
class FeatureCache:
    """Features by image, shared by all copies of one model.

    Attributes:
        limit: bytes that the kept features may take; what does not fit is computed every time.
        why_not: why this model's features are not kept; '' when they are.
        held: bytes that they take.
        served: images whose features were there.
        encoded: images that were encoded while the cache was open.
        full: whether features did not fit.
    """

    limit: int
    why_not: str = ""
    held: int = 0
    served: int = 0
    encoded: int = 0
    full: bool = False
    _features: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)
    _open: bool = field(default=False, repr=False)
    _pack: Callable[[list[Tensor]], Any] = field(default=list, repr=False)

    def __deepcopy__(self, memo: dict[int, Any]) -> FeatureCache:
        """Itself: students share it with their model."""
        return self

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Serve features inside; outside, e.g. where a model is timed, every image is encoded."""
        before, self._open = self._open, not self.why_not
        try:
            yield
        finally:
            self._open = before

    def give_up(self, reason: str) -> None:
        """Keep nothing from now on."""
        self.why_not, self._open, self.held = reason, False, 0
        self._features.clear()

    def attach(self, owner: nn.Module) -> None:
        """Let `owner`, which has the method, and every copy that is made of it ask here."""
        owner.eas_features = self  # type: ignore[assignment]
        setattr(owner, METHOD, types.MethodType(_asking(getattr(type(owner), METHOD)), owner))

    def answer(self, compute: Callable[..., Any], call: Mapping[str, Any]) -> Any:
        """What `compute(**call)` returns, as far as a forward pass uses it."""
        rows = split_call(call)
        if rows is None:
            return compute(**call)
        constants = repr(sorted((name, value) for name, value in call.items() if not isinstance(value, Tensor)))
        keys = [(constants, *key) for key in zip(*map(_keys, _columns(rows)), strict=True)]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._features}
        fresh: dict[tuple[object, ...], Tensor] = {}
        missing = list(new)
        for start in range(0, len(missing), ENCODED_TOGETHER):
            part = missing[start : start + ENCODED_TOGETHER]
            features = self._encode(compute, call, [new[key] for key in part])
            if features is None:
                return compute(**call)
            fresh.update(zip(part, features, strict=True))
        self.encoded += len(fresh)
        self.served += len(keys) - len(fresh)
        values = [self._features[key] if key in self._features else fresh[key] for key in keys]
        for key, value in fresh.items():
            self._keep(key, value)
        return self._pack(values)

    def _keep(self, key: tuple[object, ...], value: Tensor) -> None:
        if self.held + value.nbytes > self.limit:
            self.full = True
            return
        self._features[key] = value.clone()  # not a view of the whole batch
        self.held += value.nbytes

    def _encode(self, compute: Callable[..., Any], call: Mapping[str, Any], rows: list[Row]) -> list[Tensor] | None:
        """Features of each row; None when the model does not give them image by image."""
        filled = rows + rows[-1:] * (ENCODED_TOGETHER - len(rows))
        joined = {name: torch.cat([row[name] for row in filled]) for name in rows[0]}
        # Not an inference tensor even where nothing is trained right now: a later training step reads it, too.
        with torch.inference_mode(False), torch.no_grad():
            output = compute(**{**call, **joined})
        unpacked = split_output(output, len(filled))
        if unpacked is None:
            return None
        features, self._pack = unpacked
        return features[: len(rows)]


def _asking(method: Any) -> Any:
    """What stands in the place of the model's own method; `generate` reads off the signature what to call it with.

    Features are of full precision even where the rest is not: whether they are remembered changes nothing, and what is
    judged in full precision takes the same ones.
    """

    @functools.wraps(method)
    def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache: FeatureCache = self.eas_features
        with torch.autocast(next(self.parameters()).device.type, enabled=False):
            if not cache._open:
                return method(self, *args, **kwargs)
            return cache.answer(types.MethodType(method, self), bound_call(method, self, args, kwargs))

    return ask


def bound_call(method: Any, owner: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    found = dict(inspect.signature(method).bind(owner, *args, **kwargs).arguments)
    found.pop("self")
    return {**{name: value for name, value in found.items() if name != "kwargs"}, **found.get("kwargs", {})}


def split_call(call: Mapping[str, Any]) -> list[Row] | None:
    """The tensors of a call image by image, each [1, …], or [patches, …] where all images' patches form one list.

    None when the tensors do not say how.
    """
    tensors = {name: value for name, value in call.items() if isinstance(value, Tensor)}
    grid = next((value for name, value in tensors.items() if name.endswith("grid_thw")), None)
    sizes = None if grid is None else grid.prod(dim=-1).tolist()
    count = len(next(iter(tensors.values()))) if grid is None else len(grid)
    columns = {}
    for name, value in tensors.items():
        if value.dim() > 0 and len(value) == count:
            columns[name] = value.split(1)
        elif sizes is not None and len(value) == sum(sizes):
            columns[name] = value.split(sizes)
        else:
            return None
    return [dict(zip(columns, pieces, strict=True)) for pieces in zip(*columns.values(), strict=True)]


def split_output(output: Any, count: int) -> tuple[list[Tensor], Callable[[list[Tensor]], Any]] | None:
    """(features of each of `count` images, how they are put together again); None when they cannot be told apart."""
    value = output if isinstance(output, Tensor) else getattr(output, "pooler_output", None)
    more = () if isinstance(output, Tensor) else (name for name in dict(output or {}) if name not in _OBSERVED)
    if value is None or len(value) != count or any(output[name] is not None for name in more):
        return None
    kind: Callable[[list[Tensor]], Any] = torch.stack if isinstance(value, Tensor) else type(value)
    if isinstance(output, Tensor):
        return list(value), kind
    return list(value), lambda rows: type(output)(pooler_output=kind(rows))


def _columns(rows: list[Row]) -> list[list[Tensor]]:
    return [[row[name] for row in rows] for name in rows[0]]


def _keys(pieces: list[Tensor]) -> list[tuple[int, int]]:
    """Fingerprints of one argument's pieces."""
    if len({piece.shape for piece in pieces}) == 1:
        return fingerprints(torch.stack(pieces))
    return [fingerprints(piece.reshape(1, -1))[0] for piece in pieces]
