"""Locks that the system gives back when their holder dies, whatever it dies of."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cl_graft.store.files import LEFT, RecordError, refused

if TYPE_CHECKING:
    from filelock import FileLock


class Busy(RecordError):
    """A file or folder that another process is making."""


@contextmanager
def locked(path: Path, patient: bool = True) -> Iterator[None]:
    """Hold the lock of `path` while it is made: whoever comes second waits, and finds the work done.

    What a process that was killed meanwhile left half-made beside `path` is removed.
    Raises RecordError where the disk refuses even a lock, and Busy, if not patient, where it would have to wait.
    """
    from filelock import Timeout

    lock = file_lock(Path(f"{path}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if patient else 0)
    except Timeout:
        raise Busy(f"{path} is being made by another process; wait for it.") from None
    except OSError as error:
        raise refused(path, str(error.strerror)) from error
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}[.-]*"):
            if left.suffix in LEFT:
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def file_lock(path: Path) -> FileLock:
    """The system's own lock, which it releases when its holder dies; where it has none, taking it raises OSError."""
    from filelock import FileLock

    return FileLock(path, fallback_to_soft=False)


def use(path: Path, reader: object) -> None:
    """Tell that `path` is read for as long as `reader` lives; under its lock, so that it cannot vanish before."""
    with suppress(OSError):  # a disk without locks protects nothing
        descriptor = os.open(f"{path}.used", os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(reader, os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def used(path: Path) -> bool:
    """Whether a process has told by `use` that it reads `path`."""
    return held(Path(f"{path}.used"), fcntl.LOCK_EX)


def held(path: Path, kind: int = fcntl.LOCK_SH) -> bool:
    """Whether a process holds the lock of this file now; kind: LOCK_EX asks for shared ones, too."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False
