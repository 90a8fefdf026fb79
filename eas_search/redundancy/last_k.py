"""The depth of a site: skip the last ones first. It looks at nothing, so a metric must beat it to be worth its cost."""

from __future__ import annotations

from typing import Any

from eas_search.redundancy.passes import Passes


def last_k_scores(passes: Passes) -> list[float]:
    """Position of a site's block in its list of blocks as a fraction in [0, 1), so that all towers count alike.

    Sites of one block keep their order, by shares of one position.
    """
    supernet, scores = passes.supernet, []
    for site in supernet.sites:
        path, _, position = site.block.rpartition(".")
        stack: Any = supernet.model.get_submodule(path)
        siblings = [other.index for other in supernet.sites if other.block == site.block]
        scores.append((int(position) + siblings.index(site.index) / len(siblings)) / len(stack))
    return scores
