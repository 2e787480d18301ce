"""The report as pages that open from the file system: one for everything, one for each cell.

<folder>/index.html         ranking, figures, breakdown by task, costs, versions, how to reproduce
<folder>/cells/<cell>.html  a cell: its matrix, config, versions, losses and every test example
<folder>/dark/<figure>.svg  the figures for a dark page
<folder>/made.json          of what each figure and cell's page was made: what has not changed is not made again
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from typing import Any

from ...identity import digest
from .. import Found, budgets
from ..figures import FIGURES, draw
from ..series import groups, slugged
from ..standing import reader, standings, table
from ..style import files_of
from ..table import TEXTS, write_atomic
from . import cell, index, sources

ALONE = 8  # work below this, in figures, is done in this process
SMALL = 0.02  # a cell's page beside a figure
CHUNK = 25  # cells' pages of one task


def write(found: Sequence[Found], folder: Path) -> Path:
    """Everything above for these cells, and the figures; returns the index. Raises OSError where the disk refuses."""
    placed = {id(f.cell): f for f in found}
    titled = groups([f.cell for f in found])
    members = {slug: [placed[id(c)] for c in those] for slug, those in slugged(titled)}
    work = _Work(folder / "made.json")
    for slug, those in members.items():
        cells = [f.cell for f in those]
        key = digest(cells, sources.of_figures())
        for name in FIGURES:
            stem = folder / f"{slug}-{name}"
            work.add(files_of(stem), key, partial(draw, name, cells, stem), 1.0)
    over = list(slugged(budgets.groups([f.cell for f in found])))
    for slug, several in over:
        stem = folder / f"{slug}-budgets"
        key = digest(several, sources.of_figures())
        files = [*files_of(stem), *(stem.with_name(f"{stem.name}.{kind}") for kind in TEXTS)]
        work.add(files, key, partial(budgets.write, several, stem), 1.0)
    pages = {f.path: cell.file(f, folder) for f in found}
    for slug, those in members.items():
        for f in those:
            page = partial(cell.write, f, pages[f.path], slug)
            work.add([pages[f.path]], sources.of_cell(f, slug), page, SMALL)
    with work:
        examples = reader()
        known = {slug: standings(those, examples) for slug, those in members.items()}
        for title, (slug, ranked) in zip(titled, known.items(), strict=True):
            table(title, ranked).write(folder / f"{slug}-intervals")
    shown = [(f"{slug}-budgets", f"{c[0]['scenario']} · {c[0]['model']}") for slug, c in over]
    text = index.render(members, list(titled), known, shown)
    return write_atomic(folder / "index.html", text.encode())


def _context() -> Any:
    """Processes forked from one that has imported what draws, where the system can."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload([f"{__package__}.preload"])
    return context


def _all(calls: Sequence[partial[Any]]) -> None:
    for call in calls:
        call()


@dataclass
class _Work:
    """Files that are to be made, in other processes where that pays; `with` waits for them."""

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
        """To be made by one call unless all were made of the same before and are there; key: of what."""
        name = files[0].relative_to(self.record.parent).as_posix()
        self.made[name] = key
        if self.before.get(name) == key and all(file.is_file() for file in files):
            return
        self.cost += cost
        (self.small if cost == SMALL else self.large).append(call)

    def __enter__(self) -> None:
        self.record.parent.mkdir(parents=True, exist_ok=True)
        chunks = [[call] for call in self.large]
        chunks += [self.small[k : k + CHUNK] for k in range(0, len(self.small), CHUNK)]
        if self.cost < ALONE:
            for chunk in chunks:
                _all(chunk)
            return
        workers = min(
            len(chunks),
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
        )
        self.pool = ProcessPoolExecutor(workers, _context())
        self.waiting = [self.pool.submit(_all, chunk) for chunk in chunks]

    def __exit__(self, kind: Any, *_: object) -> None:
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=kind is not None)
        for done in self.waiting:
            if kind is None:
                done.result()
        if kind is None:
            write_atomic(self.record, json.dumps(self.made, indent=0).encode())
