"""Text, JSON and JSON lines on disk: a file is there as a whole or not at all; torn last lines are passed over."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from cl_graft.atomic import replacing
from cl_graft.errors import CLGraftError, Refused

LEFT = (".tmp", ".part")  # ends of the names of what is being written, here or from a mirror


class RecordError(CLGraftError):
    """A results folder cannot be read, written, or continued."""


class DiskRefused(RecordError, Refused):
    """A file that the disk does not take."""


def write_bytes(path: Path, data: bytes) -> None:
    """Put a file with these bytes at `path`, in folders that are made for it; a kill leaves it whole or as it was.

    Raises DiskRefused if the disk takes no more.
    """

    def refusal(error: OSError) -> DiskRefused:
        return DiskRefused(
            f"{path} cannot be written ({error.strerror}); free space or choose another --out, "
            "then run the same command again to continue."
        )

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise refusal(error) from error
    with replacing(path, refusal) as write:
        write(data, 0)


def write_text(path: Path, text: str) -> None:
    """Put a file with this text, in UTF-8, at `path`, as `write_bytes` does."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path} cannot be read ({error}); delete its cell's folder to compute it anew."
        ) from error


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSON-lines file; a torn last line, as a kill leaves, is passed over.

    Raises RecordError for a broken line elsewhere, with its number, and for a file that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read ({error.strerror}); delete its cell's folder to compute it anew."
        ) from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise RecordError(
                f"{path}, line {number} is not JSON ({error}); delete its cell's folder to compute it anew."
            ) from error


def write_lines(path: Path, about: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines under a first one, which says `about` and how many follow it."""
    texts = [json.dumps(line) for line in lines]
    first = json.dumps({**about, "lines": len(texts)})
    write_text(path, "".join(f"{text}\n" for text in (first, *texts)))


def read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """What `write_lines` wrote; None for a file that is not there, or not all there."""
    try:
        first, *lines = read_jsonl(path)
    except (RecordError, ValueError):
        return None
    whole = isinstance(first, dict) and first.get("lines") == len(lines)
    return (first, lines) if whole else None


def flush(folder: Path) -> None:
    """Push every file of a folder to the disk, before a marker says that it is whole."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def refused(path: Path, reason: str) -> DiskRefused:
    """What to raise where the disk does not take a file of the cache."""
    return DiskRefused(
        f"{path} cannot be written ({reason}); free space or choose another --out or --cache, "
        "then run the same command again to continue."
    )
