"""A disk that is full, or may only be read, from a given write on; a clock that leaps. For a process of its own."""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.experiment.cell import run


class Disk:
    """Counts what is asked of the disk below `root`; from number `room` on it refuses all of it.

    A file that is being written keeps half of what was to go into it. What libraries write past Python (tensors, by
    safetensors and torch.save) counts once a file and is refused in their own words.
    """

    def __init__(self, root: Path, room: int, reason: int = errno.ENOSPC):
        self.root, self.room, self.reason, self.count = str(root), room, reason, 0
        self.refused = ""  # the place that was refused first

    def asked(self, place: Any) -> bool:
        """Whether this is refused."""
        if isinstance(place, int):
            place = os.readlink(f"/proc/self/fd/{place}")
        if not str(place).startswith(self.root):
            return False
        self.count += 1
        if self.count == self.room:
            self.refused = str(place)
        return self.count >= self.room

    def refusal(self, place: Any = None) -> OSError:
        return OSError(
            self.reason, os.strerror(self.reason), place if isinstance(place, str) else None
        )

    def install(self) -> None:
        for name, place in (
            ("fsync", 0),
            ("replace", 1),
            ("rename", 1),
            ("mkdir", 0),
            ("pwrite", 0),
        ):
            setattr(os, name, self._refusing(getattr(os, name), place))
        os.open = self._opening(os.open)  # type: ignore[assignment]
        builtins.open = io.open = self._writing(io.open)  # type: ignore[assignment]
        self._tensors()

    def _refusing(self, function: Callable, place: int) -> Callable:
        def refusing(*arguments: Any, **named: Any) -> Any:
            if self.asked(arguments[place]):
                raise self.refusal()
            return function(*arguments, **named)

        return refusing

    def _opening(self, function: Callable) -> Callable:
        def opening(path: Any, flags: int, *more: Any, **named: Any) -> Any:
            if flags & os.O_CREAT and not os.path.exists(path) and self.asked(path):
                raise self.refusal()
            return function(path, flags, *more, **named)

        return opening

    def _writing(self, function: Callable) -> Callable:
        def writing(path: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if isinstance(path, int) or not set(mode) & set("wax+"):
                return function(path, mode, *more, **named)
            refused = self.asked(path)
            if refused and self.reason != errno.ENOSPC:
                raise self.refusal()
            file = function(path, mode, *more, **named)
            return Half(file, self) if refused else file

        return writing

    def _tensors(self) -> None:
        import safetensors.torch
        import torch

        save = safetensors.torch.save_file
        for module in list(sys.modules.values()):
            for name in ("save_file", "safe_save_file"):
                if getattr(module, "__dict__", {}).get(name) is save:
                    setattr(module, name, self._saving_safely(save))
        torch.save = self._saving(torch.save)

    def _saving_safely(self, function: Callable) -> Callable:
        from safetensors import SafetensorError

        def saving(tensors: Any, path: Any, *more: Any, **named: Any) -> None:
            function(tensors, path, *more, **named)
            if self.asked(path):
                os.truncate(path, os.path.getsize(path) // 2)
                raise SafetensorError(f"Error while serializing: I/O error: {self.refusal()}")

        return saving

    def _saving(self, function: Callable) -> Callable:
        def saving(value: Any, path: Any, *more: Any, **named: Any) -> None:
            function(value, path, *more, **named)
            if isinstance(path, (str, os.PathLike)) and self.asked(path):
                os.truncate(path, os.path.getsize(path) // 2)
                raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos")

        return saving


class Half:
    """A file that takes half of the first thing written to it."""

    def __init__(self, file: Any, disk: Disk):
        self.file, self.disk = file, disk

    def write(self, data: Any) -> int:
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise self.disk.refusal()

    def __enter__(self) -> Half:
        return self

    def __exit__(self, *_: Any) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def on_a_disk(says: Connection, configs: Sequence[RunConfig], room: int, reason: int) -> None:
    """Run the cell; says how often the disk was asked, the refusal in the run's own words or what went wrong, and
    which place was refused first.
    """
    (config,) = configs
    disk = Disk(config.out, room, reason)
    disk.install()
    try:
        run(config)
        said = ""
    except CLGraftError as error:
        said = str(error)
    except Exception as error:
        said = f"not for users: {type(error).__name__}: {error}"
    says.send((disk.count, said, disk.refused))


def under_a_leaping_clock(says: Connection, configs: Sequence[RunConfig]) -> None:
    """Run the cell while the clock on the wall jumps by days, back and forth, at every look."""
    (config,) = configs
    real, rng = time.time, random.Random(0)
    time.time = lambda: real() + rng.uniform(-30, 30) * 86400
    time.time_ns = lambda: int(time.time() * 1e9)
    run(config)
    says.send("done")
