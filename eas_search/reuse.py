"""What the copies of one model share while they are trained and scored, and the proof that it changes nothing."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite
from eas_search.feature_cache import METHOD, FeatureCache, bound_call, split_call, split_output
from eas_search.models.calling import without_cache
from eas_search.parts import StudentPart
from eas_search.prefix_sharing import PrefixCache

Probe = dict[str, Tensor]


@dataclass
class Caches:
    """Both caches of a model and its copies."""

    features: FeatureCache
    prefixes: PrefixCache

    def __deepcopy__(self, memo: dict[int, Any]) -> Caches:
        """Itself: students share it with their model."""
        return self

    def report(self) -> dict[str, Any]:
        """What they did, for `summary.json`."""
        return {
            "image_features": _public(self.features),
            "prefixes": _public(self.prefixes),
        }

    def notes(self) -> list[str]:
        """What they did, in words."""
        features, prefixes, said = self.features, self.prefixes, []
        if features.served:
            room = "; the rest did not fit" if features.full else ""
            said.append(
                f"Image features: {features.served} taken from memory, {features.encoded} images encoded "
                f"({features.held / 2**20:.0f} MiB kept{room})"
            )
        if prefixes.reused:
            share = prefixes.reused / (prefixes.reused + prefixes.computed)
            room = ", as much as fits" if prefixes.full else ""
            said.append(
                f"Shared prefixes: {share:.0%} of the scored layers reused ({prefixes.held / 2**20:.0f} MiB{room})"
            )
        return said


@contextmanager
def reusing(model: Any, prefixes: bool = False) -> Iterator[None]:
    """Use the caches that a model carries, if it does; `prefixes`: it will not change inside."""
    caches = getattr(model, "eas_caches", None)
    if caches is None:
        yield
        return
    with caches.features.opened():
        if not prefixes or caches.prefixes.why_not:
            yield
            return
        with caches.prefixes.sharing(model):
            yield


def attach_caches(
    model: nn.Module,
    students: Sequence[nn.Module],
    sites: Sequence[AttentionSite],
    probe: Probe,
    limits: tuple[int, int],
    tolerance: float,
) -> Caches:
    """Give a model, and all copies that will be made of it, caches for image features and for shared prefixes.

    Args:
        model: the original model, frozen, in eval mode.
        students: the model with all the changes that its copies may have.
        sites: all attention sites of the model.
        probe: a batch on which both are proved.
        limits: bytes for features, for prefixes; 0 switches one off.
        tolerance: of the logits, relative to the largest one, where images are encoded in other batches.
    """
    # Of a vision tower some models read what its layers give in between, and a layer passed over gives nothing.
    lists = tuple(dict.fromkeys(site.block.rpartition(".")[0] for site in sites if site.tower == "text"))
    caches = Caches(FeatureCache(limits[0]), PrefixCache.over(model, lists, limits[1]))
    caches.prefixes.why_not = caches.prefixes.why_not or ("" if limits[1] else "switched off")
    expected = _logits(model, probe)
    features = caches.features
    features.why_not = _attach_features(features, model, students, probe)
    with features.opened():
        for _ in range(0 if features.why_not else 2):  # encoded, then remembered
            difference = (_logits(model, probe) - expected).abs().max().item()
            if not difference <= tolerance * expected.abs().max().item():
                features.give_up(f"with features from memory the logits differ by {difference:.2g}")
    features.served = features.encoded = 0
    prefixes = caches.prefixes
    for _ in range(0 if prefixes.why_not else 2):
        with prefixes.sharing(model):
            if not torch.equal(_logits(model, probe), expected):
                prefixes.give_up("with a stream from memory the logits differ")
    prefixes.reused = prefixes.computed = 0
    model.eas_caches = caches  # type: ignore[assignment]
    return caches


def _attach_features(cache: FeatureCache, model: nn.Module, students: Sequence[nn.Module], probe: Probe) -> str:
    """Attach the cache where the model makes its features; why none are kept, or ''."""
    found = _watch(model, probe)
    if found is None:
        return f"the model makes no image features in a {METHOD} of its own"
    path, call, parts = found
    owner = model.get_submodule(path)
    inside = [f"{path}.{part}".lstrip(".") for part in parts]
    changed = [name for name in inside if any(_changed(student.get_submodule(name)) for student in students)]
    if changed:
        return f"{changed[0]} is trained or searched"
    if why_not := _not_by_image(owner, call, [m for name in inside for m in model.get_submodule(name).modules()]):
        return why_not
    cache.attach(owner)
    return "" if cache.limit else "switched off"


@torch.no_grad()
def _not_by_image(owner: Any, call: dict[str, Any], modules: Sequence[nn.Module]) -> str:
    """Why `modules`, which a call of the method runs, do not give every image features of its own; '' if they do."""
    # As it counts batches, a batch norm is not even asked what it does in training.
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        return "a batch norm mixes images"
    if (rows := split_call(call)) is None:
        return f"the arguments of {METHOD} cannot be told apart by images"
    features = []
    for training in (True, False):
        for module in modules:
            module.training = training
        features.append(split_output(getattr(owner, METHOD)(**call), len(rows)))
    first, second = features
    if first is None or second is None:
        return f"what {METHOD} gives cannot be told apart by images"
    same = all(torch.equal(one, other) for one, other in zip(first[0], second[0], strict=True))
    return "" if same else "image features are random in training"


@torch.no_grad()
def _watch(model: nn.Module, probe: Probe) -> tuple[str, dict[str, Any], list[str]] | None:
    """Who makes the features in a forward pass: (its path, the call, the modules inside that it runs), or None."""
    found: list[tuple[str, dict[str, Any], list[str]]] = []
    owners = {path: module for path, module in model.named_modules() if hasattr(type(module), METHOD)}

    def watching(path: str) -> Any:
        def ask(self: Any, *args: Any, **kwargs: Any) -> Any:
            method, called = getattr(type(self), METHOD), []
            handles = [
                module.register_forward_pre_hook(lambda _, __, name=name: called.append(name))
                for name, module in self.named_modules()
                if name
            ]
            try:
                output = method(self, *args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            outer = [name for name in called if not any(name.startswith(f"{other}.") for other in called)]
            found.append((path, bound_call(method, self, args, kwargs), list(dict.fromkeys(outer))))
            return output

        return ask

    try:
        for path, module in owners.items():
            setattr(module, METHOD, types.MethodType(watching(path), module))
        _logits(model, probe)
    finally:
        for module in owners.values():
            module.__dict__.pop(METHOD, None)
    return found[-1] if found else None  # the outermost one returns last


def _changed(module: nn.Module) -> bool:
    trained = any(parameter.requires_grad for parameter in module.parameters())
    return trained or any(isinstance(part, StudentPart) for part in module.modules())


@torch.no_grad()
def _logits(model: nn.Module, probe: Probe) -> Tensor:
    logits: Tensor = model(**probe, **without_cache(model)).logits
    return logits.float()


def _public(cache: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(cache).items() if not name.startswith("_")}
