"""Text with columns of a row in braces, as `str.format` writes them, and nothing else: no attribute, no call, no code.

`{question}` is a column, `{answers.text.0}` what is inside one (keys of an object, places in a list from 0), `{{` and
`}}` are braces. Jinja, which lm-evaluation-harness uses, is a language in which a file from a stranger can run code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from string import Formatter
from typing import Any

from cl_graft.data.columns import Misread

Row = Mapping[str, Any]

JINJA = re.compile(
    r"\{ ?([\w.]+) ?\}"
)  # what is left of `{{ question }}` once doubled braces are read


class BadTemplate(ValueError):
    """A text that is no template: how it goes on after the words "the template ..."."""


class Template:
    """A template, read once. Raises BadTemplate. columns: the ways to values that it asks for, in order."""

    def __init__(self, text: str):
        self.parts: list[tuple[str, str | None]] = []  # text, and the column after it, if any
        try:
            for before, name, spec, conversion in Formatter().parse(text):
                if spec or conversion or name is not None and not name.strip():
                    raise BadTemplate(
                        "may hold names of columns in braces alone, as {question}; a brace is written {{ or }}"
                    )
                self.parts.append((before, name and name.strip()))
        except BadTemplate:
            raise
        except ValueError as error:
            raise BadTemplate(
                f"has braces that do not match ({error}); write a brace as {{{{ or }}}}"
            ) from None
        # the parser ends a part at every brace that is doubled
        self.written = "".join(before + ("\0" if name else "") for before, name in self.parts)
        self.columns = [name for _, name in self.parts if name]

    def text(self, row: Row) -> str:
        """The text for a row. Raises Misread for a column that is not there, is empty, or holds no text or number."""
        self._refuse_jinja(row)
        return "".join(before + (_text(row, name) if name else "") for before, name in self.parts)

    def texts(self, row: Row) -> list[str]:
        """A text for each entry of the template's one column, which holds a list. Raises Misread."""
        (name,) = self.columns
        found = value(row, name)
        if not isinstance(found, list) or not found:
            raise Misread(
                f"has {type(found).__name__} in column {name!r}; a list of texts is read there."
            )
        before, after = self._around()
        return [f"{before}{_told(entry, name)}{after}" for entry in found]

    def _around(self) -> tuple[str, str]:
        """What stands before and after the one column."""
        place = next(i for i, (_, name) in enumerate(self.parts) if name)
        after = "".join(text for text, _ in self.parts[place + 1 :])
        return "".join(text for text, _ in self.parts[: place + 1]), after

    def _refuse_jinja(self, row: Row) -> None:
        for name in JINJA.findall(self.written):
            if name in row:
                raise Misread(
                    f"has a column {name!r} that the template writes in doubled braces, as Jinja does; write "
                    f"{{{name}}}."
                )


def value(row: Row, name: str) -> Any:
    """The value of a column, or what is inside one: `answers.text.0`. Raises Misread."""
    if name in row:
        return row[name]
    found: Any = row
    for part in name.split("."):
        if isinstance(found, Mapping) and part in found:
            found = found[part]
        elif isinstance(found, list) and part.isdecimal() and int(part) < len(found):
            found = found[int(part)]
        else:
            raise Misread(f"has no column {name!r}; its columns are {', '.join(row)}.")
    return found


def _text(row: Row, name: str) -> str:
    return _told(value(row, name), name)


def _told(found: Any, name: str) -> str:
    if isinstance(found, str) and found.strip():
        return found
    if isinstance(found, int | float) and not isinstance(found, bool):
        return str(found)
    if found is None or found == "" or isinstance(found, str):
        raise Misread(f"has nothing in column {name!r}; fill it or remove the row.")
    raise Misread(f"has {type(found).__name__} in column {name!r}; write text or a number there.")
