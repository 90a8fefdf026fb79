"""How a search ends before its time: Ctrl-C, and the SIGTERM of schedulers and containers."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eas_search.study.progress import Display

ENDINGS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Hold `ENDINGS` back while the storage is in use: half-done work in it could not be cleaned up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
    if received:
        signal.raise_signal(received[0])


class SureInterrupt:
    """Passes a search's news on to `display`; with the next piece of news it repeats a Ctrl-C that was lost.

    Python ignores a KeyboardInterrupt that happens to be raised inside a finaliser or a weak reference's callback.
    SIGTERM, which schedulers and containers send, is a Ctrl-C, too, until `restore`.
    """

    def __init__(self, display: Display) -> None:
        self.display, self.seen = display, False
        self.before = {number: signal.signal(number, self._handle) for number in ENDINGS}

    def restore(self) -> None:
        """Give the signals back to who handled them before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, *_: object) -> None:
        self.seen = True
        raise KeyboardInterrupt

    def __getattr__(self, name: str) -> Any:
        if self.seen:
            raise KeyboardInterrupt
        return getattr(self.display, name)
