"""Where attention lives: declared block patterns, resolved on a live model and proved by a numerical probe."""

from eas_search.architectures.patterns import PATTERNS, BlockPattern, FfnForm, register_pattern
from eas_search.architectures.probe import prove_sites
from eas_search.architectures.sites import AttentionSite, attention_sites, refused_sites, resolve_skip

__all__ = [
    "PATTERNS",
    "AttentionSite",
    "BlockPattern",
    "FfnForm",
    "attention_sites",
    "prove_sites",
    "refused_sites",
    "register_pattern",
    "resolve_skip",
]
