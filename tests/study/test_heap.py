"""The garbage collector passes over what was there before, and over nothing else."""

from __future__ import annotations

import gc
import weakref

import pytest

from eas_search.study.heap import settled_heap


class Ring:
    """Garbage that only the cyclic collector finds."""

    def __init__(self) -> None:
        self.me = self


def test_only_newer_garbage_is_collected_inside() -> None:
    kept = Ring()
    before = weakref.ref(kept)
    with settled_heap():
        del kept
        after = weakref.ref(Ring())
        gc.collect()
        assert before() is not None
        assert after() is None
    gc.collect()
    assert before() is None


def test_an_interruption_leaves_nothing_frozen() -> None:
    frozen = gc.get_freeze_count()
    with pytest.raises(KeyboardInterrupt), settled_heap():
        raise KeyboardInterrupt
    assert gc.get_freeze_count() <= frozen
