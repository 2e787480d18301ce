"""Progress on the terminal, and what a stopped command says."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer


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
    """Progress bars with the time left, one a cell under way; plain lines where stderr is no terminal."""
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
        yield _lines
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
            if what == "done":
                progress.update(known[cell], visible=False)

        yield bar


_last_line: dict[str, str] = {}


def _lines(cell: str, what: str, done: float) -> None:
    if _last_line.get(cell) != what:
        _last_line[cell] = what
        typer.echo(f"[{done:4.0%}] {cell}: {what}", err=True)
