"""Where in an author's own file a mistake is: the line that raised, told without a traceback."""

from __future__ import annotations

import inspect
import os
import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cl_graft.errors import AuthorMistake, CLGraftError

PACKAGE = Path(__file__).parents[1]
LIBRARIES = tuple(
    Path(sysconfig.get_path(kind)) for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)


def place(error: BaseException) -> str:
    """`FILE, line N` of the innermost line outside this package and the libraries; empty where there is none.

    The line that a SyntaxError is about comes before all that were run.
    """
    if isinstance(error, SyntaxError) and error.filename and error.lineno:
        return f"{_short(error.filename)}, line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_authors(frame.filename)]
    return f"{_short(own[-1].filename)}, line {own[-1].lineno}" if own else ""


def reason(error: BaseException) -> str:
    """The first line of what an error says, with its kind and its place where it is not one of ours."""
    if isinstance(error, CLGraftError):
        return str(error)
    said = f"{type(error).__name__}: {error}".strip().split("\n", 1)[0]
    where = place(error)
    return f"{where}: {said}" if where else said


def line_of(plugin: Any, name: str) -> str:
    """`FILE, line N` where a plug-in's function or class is defined; its name where that cannot be told."""
    made = getattr(plugin, "function", plugin)
    try:
        file, (_, line) = inspect.getsourcefile(made), inspect.getsourcelines(made)
    except (TypeError, OSError):
        return name
    return f"{_short(file or name)}, line {line}"


def line_with(file: Path, word: str) -> str:
    """`FILE, line N` of the first line that has the word as a text; the file alone where none has."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    quoted = (f'"{word}"', f"'{word}'")
    number = next((n for n, line in enumerate(lines, 1) if any(q in line for q in quoted)), None)
    return f"{_short(str(file))}, line {number}" if number else _short(str(file))


def require_call(plugin: Any, arguments: str) -> None:
    """Raises AuthorMistake where a function cannot be called with so many positional arguments, by these names."""
    signature = inspect.signature(plugin)
    options = [p.name for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    try:
        signature.bind(*arguments.split(", "), **dict.fromkeys(options))
    except TypeError as error:
        name = getattr(plugin, "__name__", "it")
        raise AuthorMistake(
            f"{line_of(plugin, name)}: {name} cannot be called as it is going to be ({error}); give it the arguments "
            f"{arguments}, and every other a default, after a `*`."
        ) from error


@contextmanager
def authored(what: str) -> Iterator[None]:
    """What an author's function raises is one sentence with file and line; errors of ours get their place in front."""
    try:
        yield
    except CLGraftError as error:
        # those of a kind of their own, as of missing data, are no mistake of the author's
        if type(error) is CLGraftError and (where := place(error)):
            raise CLGraftError(f"{where}: {error}") from error
        raise
    except Exception as error:
        raise CLGraftError(f"{what} fails ({reason(error)}); mend it.") from error


def _is_authors(file: str) -> bool:
    path = Path(file)
    return path.is_absolute() and not any(
        path.is_relative_to(folder) for folder in (PACKAGE, *LIBRARIES)
    )


def _short(file: str) -> str:
    below = os.path.relpath(file)
    return file if below.startswith("..") else below
