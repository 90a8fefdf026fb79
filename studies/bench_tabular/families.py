"""A task on which the demo's attentions are less redundant: what it was pretrained on, with all question families.

A plugin; `build.py` loads it.
"""

from __future__ import annotations

from typing import ClassVar

from eas_search.tasks import register_task
from eas_search.tasks.base import Example, Split, limited
from eas_search.tasks.digits_vqa import PLAIN, PRETRAINING_FAMILIES, SPLIT_SIZES, DigitsVqa, draw_examples


@register_task
class DigitsFamilies(DigitsVqa):
    """The eight families of pretraining in their own wording, about scans that pretraining has not seen."""

    name: ClassVar[str] = "digits-families"

    def examples(self, split: Split, limit: int | None = None) -> list[Example]:
        """The first `limit` examples of the split."""
        return draw_examples(PRETRAINING_FAMILIES, PLAIN, split, limited(SPLIT_SIZES, split, limit))
