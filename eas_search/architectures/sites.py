"""Attention sites: the MHA sublayers of a live model that a declared pattern explains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from eas_search.architectures.patterns import PATTERNS, BlockPattern
from eas_search.exceptions import ConfigError, UnsupportedModelError


@dataclass(frozen=True)
class AttentionSite:
    """One MHA sublayer with the norms and the FFN it feeds.

    Attributes:
        index: position in `attention_sites(model)`.
        name: dotted path of the attention module.
        block: dotted path of the block that holds it.
        tower: `text` or `vision`.
        layer: position of the block among its siblings, which is also its slot in the KV cache.
        width: width d of the residual stream.
        causal: whether the attention only looks back, so that the model decodes with a KV cache.
        pattern: how the block names its parts.
    """

    index: int
    name: str
    block: str
    tower: str
    layer: int
    width: int
    causal: bool
    pattern: BlockPattern

    @property
    def stack(self) -> str:
        """Dotted path of the module that owns the list of blocks ('' for the model itself)."""
        return self.block.rpartition(".")[0].rpartition(".")[0]


def attention_sites(model: nn.Module, towers: Iterable[str] | None = None) -> list[AttentionSite]:
    """All attention sites of `model`, text tower first, in the order of their layers.

    The text tower comes first so that an index means the same language layer with and without vision sites.

    Args:
        model: any module that holds blocks of a declared pattern.
        towers: `text`, `vision` or both; None means both.

    Raises:
        UnsupportedModelError: no block of the model fits a pattern.
        ConfigError: an unknown tower.
    """
    wanted = {"text", "vision"} if towers is None else set(towers)
    if unknown := wanted - {"text", "vision"}:
        raise ConfigError(f"tower {sorted(unknown)[0]!r} is unknown; expected 'text' or 'vision'")
    found: list[AttentionSite] = []
    for path, block in model.named_modules():
        pattern = next((p for p in PATTERNS if p.fits(block)), None)
        layer = path.rpartition(".")[2]
        if pattern is None or not layer.isdigit():
            continue
        tower = _tower(model, path)
        attention = getattr(block, pattern.attention)
        width = getattr(getattr(block, pattern.ffn), pattern.ffn_out).out_features
        causal = tower == "text" and bool(getattr(attention, "is_causal", False))
        name = f"{path}.{pattern.attention}"
        found.append(AttentionSite(0, name, path, tower, int(layer), width, causal, pattern))
    if not found:
        known = ", ".join(pattern.name for pattern in PATTERNS)
        raise UnsupportedModelError(
            f"{type(model).__name__} has no block of a known pattern ({known}); expected pre-norm blocks with one "
            "attention and one FFN: declare a BlockPattern for it"
        )
    ordered = sorted(found, key=lambda site: site.tower)  # 'text' < 'vision'; stable within a tower
    numbered = [AttentionSite(**{**vars(site), "index": index}) for index, site in enumerate(ordered)]
    return [site for site in numbered if site.tower in wanted]


def _tower(model: nn.Module, path: str) -> str:
    """The tower of a block: what the nearest enclosing pretrained model reads first."""
    names = path.split(".")
    for end in range(len(names), -1, -1):
        reads = getattr(model.get_submodule(".".join(names[:end])), "main_input_name", None)
        if reads is not None:
            return "vision" if reads == "pixel_values" else "text"
    return "text"


def resolve_skip(skip: Iterable[int | str], sites: list[AttentionSite]) -> tuple[AttentionSite, ...]:
    """The sites that a skip set names by index or by name, in the order of `sites`.

    Raises:
        ConfigError: an index out of range or an unknown name.
    """
    by_name = {site.name: site for site in sites}
    by_index = {site.index: site for site in sites}
    chosen: set[int] = set()
    for entry in skip:
        site = by_name.get(entry) if isinstance(entry, str) else by_index.get(entry)
        if site is None:
            raise ConfigError(
                f"skip names site {entry!r}; expected an index from {min(by_index)} to {max(by_index)} or a name like "
                f"{sites[0].name!r}: list them with `eas-search sites`"
            )
        chosen.add(site.index)
    return tuple(site for site in sites if site.index in chosen)
