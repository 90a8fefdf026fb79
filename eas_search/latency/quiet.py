"""A lock between processes: many may work at once, but a timing runs alone.

Two files are locked with `flock`.  Whoever works holds the *room* shared; whoever measures holds it
exclusively.  Everybody enters through the *turnstile*: a worker passes and lets go of it at once, a
measurement keeps it until it is done, so no new worker gets in ahead of a measurement that waits (a plain
shared lock would starve it).  The kernel drops both when a process ends, however it ends; nothing has to be
cleaned up.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eas_search.exceptions import ConfigError

if sys.platform != "win32":
    import fcntl

# What this process holds, as (path, process, thread).  The process is part of it because a forked child
# inherits the set but must not take its parent's lock for its own.
_held: set[tuple[str, int, int]] = set()


class QuietLock:
    """Shared for a unit of normal work (a training step, an evaluation batch), exclusive for a measurement.

        quiet = QuietLock(folder / "quiet.lock")
        with quiet.shared():
            train_step()
        with quiet.exclusive():
            measure_latency(...)

    Keep the shared sections short: a measurement waits for the longest of them.  Do not fork while holding
        the
    lock: the child would keep it after a crash of the parent.

    Args:
        path: the lock file, in an existing folder that all processes see; `<path>.turnstile` is made next to
            it.  None locks nothing, for a single worker.

    Raises:
        ConfigError: the files cannot be made, the platform has no `flock` (Windows), or a thread asks for a
            lock on a path that it already holds (it would wait for itself).
    """

    def __init__(self, path: str | Path | None) -> None:
        if path is not None and sys.platform == "win32":
            raise ConfigError(
                "timings between several workers need flock, which Windows lacks: use one worker (--jobs 1)"
            )
        self.path = None if path is None else str(Path(path).resolve())
        if self.path is not None:
            os.close(self._open(self.path))  # say now, not in the middle of a search, that the folder is unusable

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Wait until nobody measures or is about to, then work side by side with the other workers."""
        with self._entered(exclusive=False):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Keep new work out, wait until the running work is done, then be alone."""
        with self._entered(exclusive=True):
            yield

    @contextmanager
    def _entered(self, exclusive: bool) -> Iterator[None]:
        if self.path is None or sys.platform == "win32":
            yield
            return
        key = (self.path, os.getpid(), threading.get_ident())
        if key in _held:
            raise ConfigError(f"lock {self.path!r} is already held by this thread: leave shared() before exclusive()")
        turnstile, room = self._open(self.path + ".turnstile"), self._open(self.path)
        _held.add(key)
        try:
            fcntl.flock(turnstile, fcntl.LOCK_EX)
            fcntl.flock(room, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
            if not exclusive:
                fcntl.flock(turnstile, fcntl.LOCK_UN)
            yield
        finally:
            _held.discard(key)
            for file in (room, turnstile):
                # Explicitly, because closing does not unlock what a forked child still has open.
                fcntl.flock(file, fcntl.LOCK_UN)
                os.close(file)

    @staticmethod
    def _open(path: str) -> int:
        try:
            return os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ConfigError(
                f"lock file {path!r} cannot be opened ({error.strerror}): choose an existing, writable folder"
            ) from error
