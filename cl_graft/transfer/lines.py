"""A JSON-lines file that grows while a build runs: what was appended stays, a torn end is cut off."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from cl_graft.store.files import RecordError


def append(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows and flush them to disk: all of them, or none. Raises RecordError if the disk refuses."""
    text = "".join(line(row) for row in rows).encode()
    try:
        before = path.stat().st_size if path.exists() else 0
        try:
            with open(path, "ab", buffering=0) as file:
                while text:
                    text = text[file.write(text) :]
                os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):
                os.truncate(path, before)
            raise
    except OSError as error:
        raise RecordError(
            f"{path} cannot be written ({error.strerror}); free space, then run the same command again to continue."
        ) from error


def line(row: dict[str, Any]) -> str:
    """One row as a line of JSON, in ASCII: a model may say halves of surrogate pairs."""
    return json.dumps(row, allow_nan=False) + "\n"


def resume(path: Path, ends: Sequence[int]) -> list[dict[str, Any]]:
    """The rows of whole chunks; the file is cut after the last of them, as a kill in the next one leaves it.

    ends: the numbers of rows after which a chunk is whole, ascending. Raises RecordError for a file that cannot
    be read or holds what no build wrote.
    """
    if not path.exists():
        return []
    try:
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            lines.pop()
        kept = lines[: max((end for end in ends if end <= len(lines)), default=0)]
        rows = [json.loads(text) for text in kept]
        os.truncate(path, sum(map(len, kept)))
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path} cannot be continued ({error}); delete it to do its part of the build anew."
        ) from error
    return rows
