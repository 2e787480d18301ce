"""YAML files of a user's, read as plain data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_graft.errors import CLGraftError


def parsed(path: Path, cure: str, loader: Any = None) -> Any:
    """What a YAML file says, by YAML's safe loader or one made of it; a tag of Python's is no YAML here.

    cure: what to do where the file cannot be read. Raises CLGraftError there, and, with its line, for what is no YAML.
    """
    import yaml  # not for `--help`

    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=loader or yaml.SafeLoader)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise CLGraftError(
            f"{path} cannot be read ({getattr(error, 'strerror', None) or error}); {cure}."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of dates, of depth
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise CLGraftError(f"{path}{line} is not YAML ({problem or error}); mend it.") from error
