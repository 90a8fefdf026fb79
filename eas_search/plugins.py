"""A user's own tasks and block patterns: Python files or modules that register them when they are imported.

Importing one runs it. So only a flag names plugins, never a study file, a model or a stored search.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from eas_search.exceptions import ConfigError

_imported: set[str] = set()


def settled(plugin: str) -> str:
    """A module's name as it is; a file as its absolute path, so that it means the same in another process."""
    return str(Path(plugin).resolve()) if _is_file(plugin) else plugin


def plugin_name(plugin: str) -> str:
    """How a plugin is recorded: the module's name, or the file's without its folders."""
    return Path(plugin).name if _is_file(plugin) else plugin


def load_plugins(plugins: Iterable[str]) -> None:
    """Import files (`tasks/mine.py`) and modules (`my_package.tasks`), each once per process.

    Raises:
        ConfigError: one cannot be found, or fails when it is imported.
    """
    for plugin in map(settled, plugins):
        if plugin in _imported:
            continue
        try:
            if _is_file(plugin):
                _import_file(Path(plugin))
            else:
                importlib.import_module(plugin)
        except (Exception, SystemExit) as error:  # a plugin is a program; it can raise anything, and end itself
            reason = " ".join(str(error).split())[:200] or "no message"
            raise ConfigError(
                f"plugin '{plugin}' cannot be imported ({type(error).__name__}: {reason}); expected a Python file or "
                "an importable module that registers tasks or patterns: check --plugin"
            ) from error
        _imported.add(plugin)


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py") or "/" in plugin or "\\" in plugin


def _import_file(path: Path) -> None:
    name = "eas_search_plugin_" + re.sub(r"\W", "_", str(path.with_suffix("")))
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pydantic look a class's module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
