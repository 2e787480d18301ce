"""Files that are there as a whole or not at all: written beside their place, pushed to the disk, renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LONGEST = 255  # bytes of a name on the file systems there are
Write = Callable[[bytes | memoryview, int], None]  # the bytes, and where they go in the file


@contextmanager
def replacing(path: Path, refusal: Callable[[OSError], Exception]) -> Iterator[Write]:
    """Put a new file in the place of `path` at the end of the block: a kill leaves the old one or the new one.

    Yields what writes bytes at an offset. refusal: makes the error to raise of what the system refuses; errors of
    the block itself pass, and leave the old file.
    """

    @contextmanager
    def explained() -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise refusal(error) from error

    def write(data: bytes | memoryview, at: int) -> None:
        with explained():
            while len(data):
                done = os.pwrite(descriptor, data, at)
                data, at = data[done:], at + done

    # under the name of its target, by which it is found and removed after a kill, unless that is too long
    token = secrets.token_hex(8)
    name = f".{path.name}.{token}.tmp"
    sibling = path.parent / (name if len(os.fsencode(name)) <= LONGEST else f".{token}.tmp")
    try:
        with explained():
            descriptor = os.open(sibling, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            yield write
            with explained():
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with explained():
            os.replace(sibling, path)
    except BaseException:
        with suppress(OSError):  # there is none where no file can be
            sibling.unlink()
        raise
    with explained():
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
