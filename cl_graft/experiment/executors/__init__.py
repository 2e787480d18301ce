"""Who runs the cells of a sweep: each file here is an executor, `executor:` in a sweep names it.

It defines `executor(asked, cells)`, which makes of a sweep and its cells a function from cells to their outcomes. That
may start a cell as often as it likes: a cell goes on where it was left, and a finished one is not computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal, Protocol

from cl_graft.config import RunConfig

if TYPE_CHECKING:
    from cl_graft.sweep_config import Sweep


class CellProgress(Protocol):
    """Takes what is being done in a cell, the fraction of the cell that is done, and where in `what` it is."""

    def __call__(self, what: str, done: float, at: str = "") -> None: ...


class Report(Protocol):
    """Takes the same of one of several cells."""

    def __call__(self, cell: str, what: str, done: float, at: str = "") -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a cell ended.

    refused: by a disk, a network, or a folder of another experiment, and the same command tries it again. busy: what
    it needs next is being made by another cell or sweep. lost: its process or its node died, or was told to stop; what
    was finished is on disk.
    reason: of anything but `done`, in one sentence. trace: of a failure.
    """

    state: Literal["done", "failed", "refused", "busy", "lost"]
    reason: str = ""
    trace: str = ""


# What a cell that is tried again is told to be doing until then.
WAITS = {"busy": "waiting for another's work", "lost": "waiting after its process was lost"}

Work = Callable[
    [RunConfig, CellProgress, bool], Outcome
]  # attempt.attempt, or a stand-in to measure with
Executor = Callable[[Sequence[RunConfig], Report], Iterator[tuple[RunConfig, Outcome]]]


def executor(asked: Sweep, cells: Sequence[RunConfig]) -> Executor:
    """The executor that a sweep names, for its cells."""
    return import_module(f"{__name__}.{asked.executor}").executor(asked, cells)
