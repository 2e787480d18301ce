"""Progress on the terminal, and what a stopped command says."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer

SECONDS = 30.0  # after which a log without a terminal says again what is being done


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C, or SIGTERM, says how to go on and exits with 130."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to continue.", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def bars() -> Iterator[Callable[[str, str, float], None]]:
    """Progress bars with the time left, one a name; lines with the time where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[what]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    known: dict[str, Any] = {}
    with Progress(*columns, console=console) as progress:

        def bar(cell: str, what: str, done: float) -> None:
            if cell not in known:
                known[cell] = progress.add_task(cell, total=1.0, what=what)
            progress.update(known[cell], completed=done, what=what)

        yield bar


class Lines:
    """A line on stderr, beginning with the time, for what is new, and for what goes on after SECONDS without one."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.last: dict[str, tuple[str, float]] = {}  # of what: its words, and when they were told
        self.furthest = 0.0

    def due(self, name: str, what: str) -> bool:
        """Whether a line on `name` is to be written, which does `what`; it counts as written from here on."""
        words, when = self.last.get(name, ("", -math.inf))
        if words == what and self.clock() - when < SECONDS:
            return False
        self.last[name] = what, self.clock()
        return True

    def write(self, done: float, words: str) -> None:
        """Write the line. done: the share of everything; what was told before is the least that is told."""
        self.furthest = max(self.furthest, done)
        typer.echo(f"{time.strftime('%H:%M:%S')} [{self.furthest:4.0%}] {words}", err=True)

    def __call__(self, name: str, what: str, done: float) -> None:
        if self.due(name, what):
            self.write(done, f"{name}: {what}")
