"""The proof of a model's sites on its tiny twin: before the weights are there, but on numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite, attention_sites, prove_sites
from eas_search.exceptions import UnsupportedModelError
from eas_search.models.twin import quiet, tiny_twin
from eas_search.models.twin_inputs import twin_inputs
from eas_search.proof import prove_deletion

Site = AttentionSite


@dataclass(frozen=True)
class TwinProof:
    """What a twin says about the sites of the model that it stands for, by their names.

    Attributes:
        proved: the sites as found on the twin, where blocks are resolved by numbers; their indexes are the twin's.
        refused: why a site cannot be skipped.
        unproved: why the twin says nothing about a site.
        inputs: shapes of what the twin was run on.
    """

    proved: Mapping[str, Site] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    unproved: Mapping[str, str] = field(default_factory=dict)
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def prove_on_twin(model: nn.Module, sites: Sequence[Site]) -> TwinProof:
    """Prove `sites` of `model` (on the meta device, say) on a tiny twin of it with random weights.

    Two of every kind of block are tried first; what is refused for both is refused for all of that kind.
    """
    try:
        twin = tiny_twin(model)
        inputs = twin_inputs(twin)
        found = {site.name: site for site in attention_sites(twin)}
    except Exception as error:  # whatever a class raises for sizes that nobody has tried: said with every site
        reason = f"no tiny twin of it runs: {type(error).__name__}: {' '.join(str(error).split())}"[:200]
        return TwinProof(unproved={site.name: reason for site in sites})
    with one_thread(), quiet():
        reached = _reached(twin, list(found.values()), inputs)
        unproved = {site.name: "the twin has no such attention" for site in sites if site.name not in found}
        unproved |= {
            site.name: f"the twin's inputs ({', '.join(inputs)}) do not reach it"
            for site in sites
            if site.name in found and site.name not in reached
        }
        tried = [found[site.name] for site in sites if site.name in reached]
        refused = _refused(twin, tried, inputs)
    return TwinProof(
        proved={site.name: site for site in tried if site.name not in refused},
        refused=refused,
        unproved=unproved,
        inputs={name: tuple(value.shape) for name, value in inputs.items()},
    )


def _refused(twin: nn.Module, sites: list[Site], inputs: Mapping[str, Tensor]) -> dict[str, str]:
    groups: dict[object, list[Site]] = defaultdict(list)
    for site in sites:
        parts = tuple((name, type(part)) for name, part in twin.get_submodule(site.block).named_modules())
        groups[site.stack, site.kind, site.pattern, site.ffn, parts].append(site)
    ends = [site for group in groups.values() for site in {group[0].name: group[0], group[-1].name: group[-1]}.values()]
    refused = prove_deletion(twin, ends, inputs) if ends else {}
    for group in groups.values():
        if group[0].name in refused and group[-1].name in refused:
            refused |= {site.name: refused[group[0].name] for site in group}
            continue
        try:
            prove_sites(twin, group, inputs)
        except UnsupportedModelError as error:
            refused |= {site.name: str(error) for site in group}
    left = [site for site in sites if site.name not in refused]
    return refused | (prove_deletion(twin, left, inputs) if left else {})


@torch.no_grad()
def _reached(twin: nn.Module, sites: list[Site], inputs: Mapping[str, Tensor]) -> set[str]:
    """Names of the sites that a forward pass runs."""
    names: set[str] = set()
    handles = [
        twin.get_submodule(site.name).register_forward_pre_hook(lambda *_, name=site.name: names.add(name))
        for site in sites
    ]
    try:
        twin(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return names


@contextmanager
def one_thread() -> Iterator[None]:
    """While active, torch computes with one thread: more of them only hinder tiny models."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
