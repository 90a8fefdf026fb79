"""A word put in when a module is imported: `transformers` learns of our model type when it is loaded, not before.

Importing this package must not load `transformers`, and whoever imports both does it in either order.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _Loader(importlib.abc.Loader):
    """The module's own loader, with a call after it."""

    def __init__(self, own: importlib.abc.Loader, then: Callable[[], None]) -> None:
        self.own, self.then = own, then

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # What the module and its import system see is the loader that they would see without us.
        module.__loader__ = self.own
        if module.__spec__ is not None:
            module.__spec__.loader = self.own
        self.own.exec_module(module)
        self.then()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the watched modules as the other finders do, and wraps their loaders; gone once all were imported."""

    def __init__(self, watched: dict[str, Callable[[], None]]) -> None:
        self.watched = watched

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A module may be looked for without being imported, so it is watched until it runs."""
        if fullname not in self.watched:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, lambda: self._seen(fullname))
        return spec

    def _seen(self, fullname: str) -> None:
        then = self.watched.pop(fullname, None)
        if not self.watched and self in sys.meta_path:
            sys.meta_path.remove(self)
        if then is not None:
            then()


def after_import(watched: dict[str, Callable[[], None]]) -> None:
    """Call each function as soon as the module of that name is imported, now if it is already."""
    later = dict(watched)
    for name in watched:
        if name in sys.modules:
            later.pop(name)()
    if later:
        sys.meta_path.insert(0, _Finder(later))
