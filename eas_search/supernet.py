"""One model that contains every student: PIAs of the largest rank at every site, switched on and off.

Students inherit from it: smaller ranks are slices, kept sites take the light adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from eas_search.architectures import AttentionSite
from eas_search.blocks import SupernetBlock
from eas_search.exceptions import ConfigError
from eas_search.head import copy_head
from eas_search.lora import copy_lora
from eas_search.parts import AdaptedAttention
from eas_search.pia import Pia, copy_slice
from eas_search.skip_config import Placement, SkipConfig
from eas_search.skipping import adapter_parameters, apply_switches, load_adapters
from eas_search.stand_ins import SupernetStandIn
from eas_search.warm_start import SiteMoments, write_closed_form


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

    def set_skips(self, skip: Iterable[int], placement: Placement | None = None) -> None:
        """Skip exactly the sites with these indexes, with the adapters of `placement` (None: of `self.placement`)."""
        chosen = set(skip)
        config = self.config.model_copy(update={"placement": placement or self.placement})
        for site in self.sites:
            host = self.host(site)
            host.skipping, host.eas_config = site.index in chosen, config

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
