"""The live view of a sweep: cells by state, what each running one does, time left, the matrix as it fills up."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from cl_graft.cli.progress import Lines
from cl_graft.config import RunConfig
from cl_graft.experiment.executors import Report
from cl_graft.store.files import RecordError
from cl_graft.store.record import CellFolder

ROWS = 16  # of the matrix that fit beside the rest


@contextmanager
def view(cells: Sequence[RunConfig]) -> Iterator[Report]:
    """Redrawn in place on a terminal; elsewhere a line on stderr for every change of what a cell does, and for each
    that is under way at least every 30 seconds."""
    from rich.console import Console
    from rich.live import Live

    console, board = Console(stderr=True), Board(cells)
    if console.is_terminal:
        with Live(get_renderable=board.drawn, console=console, refresh_per_second=4):
            yield board.take
        return
    log, ended = Log(board), threading.Event()

    def beat() -> None:
        while not ended.wait(1.0):
            log.beat()

    beats = threading.Thread(target=beat, daemon=True)
    beats.start()
    try:
        yield log.take
    finally:
        ended.set()
        beats.join()


class Board:
    """What is known of each cell: what it does, how far it is, and the last row of its matrix."""

    def __init__(self, cells: Sequence[RunConfig], clock: Callable[[], float] = time.monotonic):
        self.configs = {config.cell: config for config in cells}
        self.clock, self.begun = clock, clock()
        self.what = {name: "" for name in self.configs}
        self.at = {name: "" for name in self.configs}
        self.done = {name: 0.0 for name in self.configs}
        self.rows: dict[str, tuple[int, dict[str, float]]] = {}
        self.preparing = ""  # what is done before any cell begins
        for name in self.configs:
            self._read(name)
        self.before = sum(self.done.values())

    def take(self, cell: str, what: str, done: float, at: str = "") -> None:
        if cell not in self.configs:
            self.preparing = ", ".join(filter(None, (what, at)))
            return
        if self.what[cell] != what:
            self.what[cell] = what
            self._read(cell)
        self.at[cell] = at
        self.done[cell] = max(self.done[cell], done)

    def doing(self, cell: str) -> str:
        """What a cell does and where it is in it."""
        return ", ".join(filter(None, (self.what[cell], self.at[cell])))

    def _read(self, name: str) -> None:
        """The last whole experience of a cell, and whether it ended before; a torn record is the cell's own affair."""
        config = self.configs[name]
        folder = CellFolder(config.out / config.cell)
        records = []
        with suppress(RecordError):
            records = folder.experiences()
        if records:
            scores = records[-1]["scores"]["score"]
            self.rows[name] = len(records) - 1, {t: 100 * c["value"] for t, c in scores.items()}
            self.done[name] = max(self.done[name], min(0.99, len(records) / (len(scores) + 1)))
        if folder.complete:
            self.what[name], self.done[name] = "done", 1.0

    def states(self) -> Counter[str]:
        """How many cells are done, failed, running and waiting."""

        def state(what: str) -> str:
            if what in ("done", "failed"):
                return what
            return "waiting" if not what or what.startswith("waiting") else "running"

        return Counter(state(what) for what in self.what.values())

    def seconds_left(self) -> float | None:
        """Seconds to the end if the rest goes as fast as what was done; None until there is something to go by."""
        now, whole = sum(self.done.values()), float(len(self.configs))
        if now - self.before < 0.02 * whole and now - self.before < 0.5:
            return None
        return (self.clock() - self.begun) * (whole - now) / (now - self.before)

    # --- drawing ---

    def drawn(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        return Group(Text(self._head()), self._running(), *self._matrix())

    def _head(self) -> str:
        counts = self.states()
        parts = [f"{counts[s]} {s}" for s in ("done", "running", "waiting", "failed") if counts[s]]
        spent, left = self.clock() - self.begun, self.seconds_left()
        told = f"{_time(spent)} so far" + (f", about {_time(left)} left" if left else "")
        preparing = f"  ·  {self.preparing}" if self.preparing and not counts["running"] else ""
        return f"{len(self.configs)} cells: {', '.join(parts)}  ·  {told}{preparing}"

    def _running(self) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        for _ in range(4):
            grid.add_column(overflow="fold")  # names that lost their ends look alike
        for name, what in self.what.items():
            if what and what not in ("done", "failed") and not what.startswith("waiting"):
                label = f"{self.configs[name].label}, seed {self.configs[name].seed}"
                done = self.done[name]
                bar = ProgressBar(total=1.0, completed=done, width=24)
                grid.add_row(Text(label), bar, f"{done:4.0%}", Text(self.doing(name)))
        return grid

    def _matrix(self) -> list[Any]:
        """The groups that have scores, those with the cells that moved last first, as many rows as fit."""
        from rich.table import Table
        from rich.text import Text

        groups: dict[tuple[str, str, str], dict[str, list[tuple[int, dict[str, float]]]]] = {}
        for name, row in list(self.rows.items()):  # drawn in another thread
            config = self.configs[name]
            group = (config.scenario_label, config.model, config.budget)
            groups.setdefault(group, {}).setdefault(config.label, []).append(row)
        tables, room = [], ROWS
        for group, labels in groups.items():
            if room <= 0:
                break
            tasks = list(dict.fromkeys(t for rows in labels.values() for _, r in rows for t in r))
            table = Table(title=Text(" · ".join(group)), title_justify="left", box=None)
            for column in ("score so far, %", *tasks, "learned"):
                side: Any = "left" if column[:5] == "score" else "right"
                table.add_column(Text(column), justify=side, overflow="fold")
            for label, rows in list(labels.items())[:room]:
                means = [_mean([r[t] for _, r in rows if t in r]) for t in tasks]
                learned = f"{_mean([k for k, _ in rows])} of {len(tasks)}"
                table.add_row(Text(label), *means, learned)
            room -= len(labels) + 3
            tables.append(table)
        return tables


class Log:
    """The board in lines, for a file or a pipe: the time, cells that ended and the share of all that is done, what a
    cell does, the step of its steps and the loss where it trains, and the time that is left for everything."""

    def __init__(self, board: Board, clock: Callable[[], float] = time.monotonic):
        self.board, self.lines, self.lock = board, Lines(clock), threading.Lock()
        self.before: tuple[str, str] | None = None  # what was done before any cell began

    def take(self, cell: str, what: str, done: float, at: str = "") -> None:
        with self.lock:
            self.board.take(cell, what, done, at)
            if cell not in self.board.configs:
                self.before = cell, what
            if self.lines.due(cell, what):
                self._write(cell, ", ".join(filter(None, (what, at))))

    def beat(self) -> None:
        """The lines that are due of what is under way."""
        with self.lock:
            for cell, what in self.board.what.items():
                if what and what not in ("done", "failed") and self.lines.due(cell, what):
                    self._write(cell, self.board.doing(cell))
            if self.before and not any(self.board.what.values()) and self.lines.due(*self.before):
                self._write(self.before[0], self.board.preparing)

    def _write(self, cell: str, doing: str) -> None:
        board = self.board
        whole, left = len(board.configs), board.seconds_left()
        ended = board.states()["done"] + board.states()["failed"]
        rest = f"about {_time(left)} left" if left is not None else "time left unknown"
        share = sum(board.done.values()) / whole
        self.lines.write(share, f"{ended} of {whole} cells, {rest}; {cell}: {doing}")


def _mean(values: Sequence[float]) -> str:
    return f"{math.fsum(values) / len(values):.1f}" if values else ""


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
