"""Making only what has changed, with all cores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

from cl_graft.processes import cores, end_with_parent, forked_from, interrupts_held
from cl_graft.report.table import write_atomic

ALONE = 8  # work below this, in figures, is done in this process
SMALL = 0.02  # a cell's page beside a figure
CHUNK = 25  # cells' pages of one task


def _context() -> Any:
    """Processes forked from one that has imported what draws."""
    return forked_from(f"{__package__}.preload")


def warm() -> None:
    """Begin to import what draws, in the process that the others are forked from, and return at once."""
    if _context().get_start_method() == "forkserver":
        with interrupts_held():
            forkserver.ensure_running()


def _all(calls: Sequence[partial[Any]]) -> None:
    for call in calls:
        call()


@dataclass
class Work:
    """Files that are to be made, in other processes where that pays; `with` waits for them.

    record: what each was made of, by its name; written by `keep`, once all that belongs to them is there.
    """

    record: Path
    made: dict[str, str] = field(default_factory=dict)
    large: list[partial[Any]] = field(default_factory=list)
    small: list[partial[Any]] = field(default_factory=list)
    cost: float = 0.0
    pool: ProcessPoolExecutor | None = None
    waiting: list[Future[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before: dict[str, str] = {}
        with suppress(OSError, ValueError):
            self.before = json.loads(self.record.read_text(encoding="utf-8"))

    def add(self, files: Sequence[Path], key: str, call: partial[Any], cost: float) -> None:
        """Add files that one call makes, unless all were made of the same before and are there; key: of what."""
        name = files[0].relative_to(self.record.parent).as_posix()
        self.made[name] = key
        if self.before.get(name) == key and all(file.is_file() for file in files):
            return
        self.cost += cost
        (self.small if cost == SMALL else self.large).append(call)

    def __enter__(self) -> None:
        if self.cost:  # of other cells from now on: whoever comes after a report that was stopped must see that
            kept = {name: key for name, key in self.before.items() if self.made.get(name) == key}
            self._record(kept)
        chunks = [[call] for call in self.large]
        chunks += [self.small[k : k + CHUNK] for k in range(0, len(self.small), CHUNK)]
        if self.cost < ALONE:
            for chunk in chunks:
                _all(chunk)
            return
        self.pool = ProcessPoolExecutor(min(len(chunks), cores()), _context(), end_with_parent)
        try:
            with interrupts_held():  # it begins its processes with what it is given to do
                self.waiting = [self.pool.submit(_all, chunk) for chunk in chunks]
        except KeyboardInterrupt:
            self.pool.shutdown(cancel_futures=True)
            raise

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.pool is None:
            return
        try:
            for done in self.waiting if kind is None else ():
                done.result()
        finally:  # what is not begun by a failure or an interrupt is left
            self.pool.shutdown(cancel_futures=True)

    def keep(self) -> None:
        self._record(self.made)

    def _record(self, made: dict[str, str]) -> None:
        write_atomic(self.record, json.dumps(made, indent=0).encode())
