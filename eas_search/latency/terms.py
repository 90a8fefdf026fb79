"""A skip configuration as one row of the latency model: which attentions cost the same, and how many of each go.

Attentions of one class cost the same wherever they sit, except at the end of a stack: behind the last attention that is
computed a prefill computes only the tokens whose logits are asked for (see `asked`), if no PIA pools.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from torch import nn

from eas_search.architectures import AttentionSite
from eas_search.models.calling import last_logits
from eas_search.skip_config import SkipConfig

Row = dict[str, float]
BASE, RANK, SQUARED, LAST = "base", ", rank", ", squared", ", last"
ORIGINAL = "original"  # the model itself, which is no configuration: a student that skips nothing has its hooks


@dataclass(frozen=True)
class SiteClasses:
    """What a site's latency depends on beside its stand-in.

    Attributes:
        names: of the classes, by index of the site.
        ends: of every stack, the indexes of its sites from the last block backwards, as far as blocks without attention
            need only some of the tokens there.
    """

    names: dict[int, str]
    ends: tuple[tuple[int, ...], ...] = ()

    def members(self) -> dict[str, list[int]]:
        """Indexes of the sites of every class."""
        found = defaultdict(list)
        for index, name in self.names.items():
            found[name].append(index)
        return dict(found)


def site_classes(model: nn.Module, sites: Sequence[AttentionSite]) -> SiteClasses:
    """The classes of `sites`: same stack, kind of attention, shapes of the block, and window."""
    named: dict[tuple[Any, ...], str] = {}
    classes = {}
    for site in sites:
        shapes = tuple((name, tuple(p.shape)) for name, p in model.get_submodule(site.block).named_parameters())
        window = getattr(model.get_submodule(site.name), "sliding_window", None)
        key = (site.stack, site.pattern.name, site.kind, shapes, window)
        if key not in named:
            name = f"{site.tower} {site.kind}"
            alike = sum(known.startswith(name) for known in named.values())
            named[key] = f"{name} {alike + 1}" if alike else name
        classes[site.index] = named[key]
    return SiteClasses(classes, ends_of_stacks(model, sites))


def ends_of_stacks(model: nn.Module, sites: Sequence[AttentionSite]) -> tuple[tuple[int, ...], ...]:
    """See `SiteClasses.ends`."""
    if not last_logits(model):
        return ()
    able = {site.block: site.index for site in sites if site.whole and site.causal}
    found = []
    for path in dict.fromkeys(block.rpartition(".")[0] for block in able):
        end = []
        for name in reversed([name for name, _ in model.get_submodule(path).named_children()]):
            if f"{path}.{name}" not in able:
                break
            end.append(able[f"{path}.{name}"])
        found.append(tuple(end))
    return tuple(found)


def last_sites(config: SkipConfig, ends: Sequence[Sequence[int]]) -> list[int]:
    """Sites whose FFN a prefill runs for the last token alone: those behind the last attention of their stack, and it.

    With PIAs that pool there are none: they need all tokens.

    Args:
        config: what is skipped, as indexes.
        ends: see `SiteClasses.ends`.
    """
    skip, found = set(config.skip), list[int]()
    for end in ends if config.pooling == "none" or config.pia_dim == 0 else ():
        behind = len(list(takewhile(skip.__contains__, end)))
        found += end[: behind + 1] if not skip.isdisjoint(end) else ()
    return found


def terms_of(config: SkipConfig, classes: SiteClasses) -> Row:
    """A configuration as one row of the model in `predictor`: how often each of its terms occurs."""
    form = config.placement if config.pia_dim else "deleted"
    row = {BASE: 1.0}
    for name, count in Counter(classes.names[int(index)] for index in config.skip).items():
        row[f"{name}, {form}"] = float(count)
        row[f"{name}, {form}{RANK}"] = float(count * config.pia_dim)
        row[f"{name}{SQUARED}"] = float(count**2)
    for name, count in Counter(classes.names[index] for index in last_sites(config, classes.ends)).items():
        row[f"{name}{LAST}"] = float(count)
    return row
