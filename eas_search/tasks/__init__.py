"""Downstream tasks by name.

A built-in task is imported when it is asked for, so that importing this package stays light.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from eas_search.exceptions import ConfigError
from eas_search.tasks.base import Example, Split, Task

__all__ = ["Example", "Split", "Task", "get_task", "register_task", "task_names"]

_BUILT_IN = {"digits-vqa": "eas_search.tasks.digits_vqa:DigitsVqa"}
_registered: dict[str, type[Task]] = {}


def task_names() -> list[str]:
    """Names that `get_task` knows, sorted."""
    return sorted({*_BUILT_IN, *_registered})


def register_task(cls: type[Task]) -> type[Task]:
    """Make a Task subclass known under `cls.name`; usable as a decorator.

    Raises ConfigError if it has no name or another class holds the name already.
    """
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f"task class '{cls.__name__}' has name {name!r}; expected a text; set the class attribute 'name'."
        )
    if name in _BUILT_IN or _registered.get(name, cls) is not cls:
        raise ConfigError(f"task name '{name}' is taken; expected a new one; rename the class attribute 'name'.")
    _registered[name] = cls
    return cls


def get_task(name: str, data: Path | None = None) -> Task:
    """The task called `name`, reading from the folder `data` if it needs one.

    Raises ConfigError for an unknown name and TaskDataError for unusable data.
    """
    if name in _registered:
        return _registered[name](data)
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        cls: type[Task] = getattr(import_module(module), attribute)
        return cls(data)
    close = get_close_matches(name, task_names(), n=1)
    hint = f"did you mean '{close[0]}'?" if close else "choose one of these or register yours with register_task."
    raise ConfigError(f"task '{name}' is unknown; expected one of {', '.join(task_names())}; {hint}")
