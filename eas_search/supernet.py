"""One model that contains every student: PIAs of the largest rank at every site, switched on and off.

Students inherit from it: smaller ranks are slices, kept sites take the light adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from eas_search.architectures import AttentionSite
from eas_search.blocks import SupernetBlock
from eas_search.exceptions import ConfigError
from eas_search.head import copy_head
from eas_search.lora import copy_lora
from eas_search.models.calling import without_cache
from eas_search.parts import AdaptedAttention
from eas_search.pia import Pia, copy_slice
from eas_search.skip_config import Placement, SkipConfig
from eas_search.skipping import adapter_parameters, apply_switches, load_adapters
from eas_search.stand_ins import SupernetStandIn
from eas_search.training import on_device
from eas_search.warm_start import SiteMoments, calibrate, write_closed_form

LATER = {"text": 1, "fusion": 2}  # towers that read what others give


class Supernet:
    """A switchable student.

    Attributes:
        model: the module tree; skips whatever `set_skips` said last.
        sites: the searchable sites, in the order of `attention_sites`.
        config: the largest configuration, with an empty skip set.
        placement: whose adapters stand in when `set_skips` is not told.
    """

    def __init__(self, model: nn.Module, sites: Sequence[AttentionSite], config: SkipConfig) -> None:
        """Build from an original model.

        Args:
            model: the original model; untouched.
            sites: which of its sites can be switched.
            config: ranks, pooling, router …; its skip set must be empty. Placement `parallel` has the adapters of all
                three placements; rank 0 makes switches of plain deletion.
        """
        if config.skip:
            raise ConfigError(f"a supernet starts with nothing skipped; expected skip = [], got {list(config.skip)}")
        self.sites, self.config = tuple(sites), config
        self.placement: Placement = config.placement
        self.model = apply_switches(model, config, self.sites)

    def host(self, site: AttentionSite) -> SupernetBlock | SupernetStandIn:
        """What can be switched at a site: its block, or its attention alone."""
        host = self.model.get_submodule(site.host)
        assert isinstance(host, SupernetBlock | SupernetStandIn)
        return host

    def set_skips(self, skip: Iterable[int], placement: Placement | None = None, pia_dim: int | None = None) -> None:
        """Skip exactly the sites with these indexes.

        Args:
            skip: indexes of sites.
            placement: whose adapters stand in; None: those of `self.placement`.
            pia_dim: their rank, of which they use the leading units; None: all of it. 0 is plain deletion.
        """
        chosen, rank = set(skip), self.config.pia_dim if pia_dim is None else pia_dim
        config = self.config.model_copy(update={"placement": placement or self.placement, "pia_dim": rank})
        for site in self.sites:
            host = self.host(site)
            host.skipping, host.eas_config = site.index in chosen, config
            for pia in self.pias(site).values():
                pia.active = None if rank == pia.shape.rank else rank

    @torch.no_grad()
    def intact_logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Logits of the model that skips nothing, in eval mode; leaves it so that nothing is skipped."""
        training, model = self.model.training, self.model
        self.set_skips(())
        model.eval()
        logits = getattr(model(**on_device(batch, model), **without_cache(model)), "logits", None)
        model.train(training)
        if not isinstance(logits, Tensor):
            raise ConfigError("distill is set, but the model's output has no logits; expected distill: 0 for this task")
        return logits

    def pias(self, site: AttentionSite) -> dict[str, Pia]:
        """The PIAs of a site by target: `ffn`, `stream`."""
        host = self.host(site)
        both: dict[str, Any] = {"ffn": getattr(host, "pia_ffn", None), "stream": getattr(host, "pia_stream", None)}
        return {name: pia for name, pia in both.items() if pia is not None}

    def warm_start(self, moments: dict[str, SiteMoments]) -> dict[str, float]:
        """Closed-form start of every PIA; returns R² of the attention's output by site name."""
        explained = {}
        for site in self.sites:
            for target, pia in self.pias(site).items():
                explained[f"{site.name}:{target}"] = write_closed_form(pia, moments[site.name], target)
        return explained

    @contextmanager
    def refitted(self, config: SkipConfig, batches: Sequence[dict[str, Tensor]]) -> Iterator[None]:
        """Closed-form PIAs for one skip set, fitted site after site with the earlier ones already replaced.

        The joint start fits every site on the activations of the intact model, but in a student they have been through
        the stand-ins of the sites before. At the end the supernet has its own PIAs back.

        Args:
            config: skip set, placement and rank of the student that is to inherit.
            batches: calibration batches, as in training.
        """
        # In the order of the computation: the sites of the text tower come first, but it reads the others' output.
        chosen = sorted((s for s in self.sites if s.index in config.skip), key=lambda s: LATER.get(s.tower, 0))
        kept = [(pia, deepcopy(pia.state_dict())) for site in chosen for pia in self.pias(site).values()]
        try:
            for position, site in enumerate(chosen):
                self.set_skips((earlier.index for earlier in chosen[:position]), config.placement, config.pia_dim)
                moments = calibrate(self.model, [site], batches, config.identity)
                for target, pia in self.pias(site).items():
                    write_closed_form(pia, moments[site.name], target)
            yield
        finally:
            for pia, state in kept:
                pia.load_state_dict(state)
            self.set_skips(())

    def adapters(self) -> dict[str, Tensor]:
        """All trainable tensors by name, for safetensors."""
        return {name: parameter.detach() for name, parameter in adapter_parameters(self.model).items()}

    def load_adapters(self, tensors: Mapping[str, Tensor]) -> None:
        """Inverse of `adapters`; raises `ConfigError` when the tensors belong to another supernet."""
        load_adapters(self.model, tensors)

    def take_light_adapters(self, student: nn.Module) -> None:
        """Start the adapters of attentions, and a new head, from those of a trained student that skips nothing."""
        _copy_light_adapters(student, self.model)

    def inherit(self, student: nn.Module) -> None:
        """Give a student made from the same model the weights of this supernet's adapters (copied)."""
        for site in self.sites:
            host = _module(student, site.host)
            for target, pia in self.pias(site).items():
                theirs = getattr(host, f"pia_{target}", None)
                if theirs is not None:
                    copy_slice(pia, theirs)
        _copy_light_adapters(self.model, student)


def _copy_light_adapters(source: Any, target: Any) -> None:
    """Copy a new head, and the adapters of all attentions that are kept in both students, switchable or not."""
    copy_head(source, target)
    if source.eas.config.adapter == "lora":
        copy_lora(source, target)
    for site in source.eas.sites:
        theirs, mine = (_module(tree, site.name) for tree in (source, target))
        if isinstance(theirs, AdaptedAttention) and isinstance(mine, AdaptedAttention):
            given, taken = (getattr(attention, "eas_adapter", None) for attention in (theirs, mine))
            if given is not None and taken is not None:
                taken.load_state_dict(given.state_dict())


def _module(tree: nn.Module, path: str) -> Any:
    """The module at `path`, or None where it was deleted."""
    try:
        return tree.get_submodule(path)
    except AttributeError:
        return None
