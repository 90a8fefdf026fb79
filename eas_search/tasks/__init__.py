"""Downstream tasks by name.

A built-in task is imported when it is asked for, so that importing this package stays light.
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from eas_search.exceptions import ConfigError
from eas_search.tasks.base import Example, Split, Task, TaskOptions

__all__ = ["Example", "Split", "Task", "TaskOptions", "get_task", "register_task", "task_names"]

_BUILT_IN = {
    "aid": "eas_search.tasks.aid:Aid",
    "causal-lm": "eas_search.tasks.causal_lm:CausalLm",
    "digits-vqa": "eas_search.tasks.digits_vqa:DigitsVqa",
    "flickr30k": "eas_search.tasks.flickr30k:Flickr30k",
    "image-classification": "eas_search.tasks.image_classification:ImageClassification",
    "multiple-choice": "eas_search.tasks.multiple_choice:MultipleChoice",
    "nlvr2": "eas_search.tasks.nlvr2:Nlvr2",
    "scienceqa": "eas_search.tasks.scienceqa:ScienceQa",
    "slake": "eas_search.tasks.slake:Slake",
    "text-classification": "eas_search.tasks.text_classification:TextClassification",
    "vqa": "eas_search.tasks.vqa:Vqa",
    "vqav2": "eas_search.tasks.vqav2:VqaV2",
}
LM_EVAL = "lm-eval:"  # followed by the name of a task of lm-evaluation-harness
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
    if name in _BUILT_IN or name.startswith(LM_EVAL) or _registered.get(name, cls) is not cls:
        raise ConfigError(f"task name '{name}' is taken; expected a new one; rename the class attribute 'name'.")
    _registered[name] = cls
    return cls


def get_task(name: str, data: Path | None = None, options: Mapping[str, Any] | None = None) -> Task:
    """The task called `name`, reading from `data` (a file, a folder, a hub id) if it needs any.

    Raises ConfigError for an unknown name or option and TaskDataError for unusable data.
    """
    if name in _registered:
        return _registered[name](data, options)
    if name.startswith(LM_EVAL):
        harness = import_module("eas_search.tasks.lm_eval")
        task: Task = harness.lm_eval_task(name)(data, options)
        return task
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        cls: type[Task] = getattr(import_module(module), attribute)
        return cls(data, options)
    close = get_close_matches(name, task_names(), n=1)
    hint = f"did you mean '{close[0]}'?" if close else "choose one of these or register yours with register_task."
    raise ConfigError(f"task '{name}' is unknown; expected one of {', '.join(task_names())}, {LM_EVAL}NAME; {hint}")
