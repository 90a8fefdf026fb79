"""Keeps Python's cyclic garbage collector away from what was loaded."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def settled_heap() -> Iterator[None]:
    """Inside, a collection looks only at objects that are newer than this call.

    Libraries, model and samples are a million objects that stay; walking through them again and again took 8 % of the
    demo's training.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
