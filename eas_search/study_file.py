"""Study files: settings as YAML."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from eas_search.exceptions import ConfigError


def read_study_file(path: Path) -> dict[str, Any]:
    """Settings by name, as they stand in the file.

    Raises:
        ConfigError: it cannot be read, or is not a YAML mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"study file {str(path)!r} cannot be read ({reason}); check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(
            f"study file {str(path)!r} is malformed{where}: {problem}; expected YAML like 'budget: 50'"
        ) from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(f"study file {str(path)!r} holds a {type(content).__name__}; expected 'name: value' lines")
    return {str(key): value for key, value in (content or {}).items()}
