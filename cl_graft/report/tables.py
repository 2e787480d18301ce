"""Tables of a sweep: ranking, forgetting matrices, tasks, costs and cells, as text, CSV, Markdown and LaTeX.

Every function takes a list of cells; `aggregate.py` says what a cell is and how cells are averaged over seeds. Scores
are per cent in the tables.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cl_graft.matrix import METRICS, FloatArray
from cl_graft.report.aggregate import (
    KINDS,
    PROTOCOLS,
    Cell,
    Line,
    average,
    extra,
    general,
    groups,
    lines_of,
    number,
    protocol,
    scored_by,
    slugged,
    told_apart,
)
from cl_graft.report.routing import accuracy, confusion_csv, confusion_tables, inferred
from cl_graft.report.table import UNMEASURED, Table, show, write_atomic

BYTES_NOTE = (
    "Bytes alive: all that is kept after the last task, the packs still needed and what the tasks share. Largest pack: "
    "bytes of the largest pack that one task stored."
)
COST_NOTE = (
    "Means over seeds. Training counts for every cell that used it, shared or not; harness is what was neither "
    "training, generating nor compressing. Peak memory is that of the process. " + BYTES_NOTE
)
NOTE = (
    "Scores, OP, BWT, FM and the change of general ability in per cent; ± is the standard error "
    f"over seeds, or over test examples where there is one seed. {BYTES_NOTE} Storage: bytes alive over the tasks "
    f"learned, in per cent of the base model in bf16. {PROTOCOLS}"
)
ROUTING_NOTE = (
    " Routing: per cent of the test examples of all tasks that were taken for the task they are of."
)


def ranking(cells: Sequence[Cell]) -> list[Table]:
    """A table for each group: a row for each label, the best OP first, incomplete cells last."""
    tables = []
    for title, members in groups(cells).items():
        lines = sorted(
            lines_of(members), key=lambda s: np.nan_to_num(-s.metric("op")[0], nan=math.inf)
        )
        lines.sort(key=lambda s: not s.complete)
        routed = any(map(inferred, members))
        columns = ("Strategy", "Task IDs", *lines[0].tasks, "OP", "BWT", "FM", "General Δ")
        columns += ("Routing",) if routed else ()
        columns += ("Storage %", "Bytes alive", "Largest pack", "Train s", "Seeds")
        rows, exact = (
            tuple(_ranking_row(line, routed, spec) for line in lines) for spec in (".1f", ".4f")
        )
        note = NOTE + (ROUTING_NOTE if routed else "") + scored_by(members)
        tables.append(Table(f"Ranking: {title}", columns, rows, note, exact))
    return tables


def matrices(cells: Sequence[Cell]) -> list[Table]:
    """The forgetting matrix of each label of each group: a row per experience, a column per task.

    General ability, where any cell of the group has it, is the last column. The other metrics that
    a cell recorded follow in tables of their own, in their own unit, with the error over seeds.
    """
    made = []
    for title, members in groups(cells).items():
        for line in lines_of(members):
            columns, mean, se = ("Experience", *line.tasks), line.mean, line.stderr
            if any(not np.isnan(general(cell)).all() for cell in members):
                ability = average([general(cell) for cell in line.cells])
                mean, se = np.column_stack([mean, ability[0]]), np.column_stack([se, ability[1]])
                columns += ("General ability",)
            name, note = f"{title}: {line.title}", _not_measured_again(line) + scored_by(line.cells)
            made.append(_matrix(name, columns, 100.0 * mean, 100.0 * se, ".1f", note))
            for metric in sorted({m for c in line.cells for m in c.get("extra_matrices") or {}}):
                mean, se = average([extra(cell, metric) for cell in line.cells])
                name = f"{title}: {line.title}, {metric}"
                made.append(_matrix(name, ("Experience", *line.tasks), mean, se, ".3f"))
    return made


def metrics(cells: Sequence[Cell]) -> list[Table]:
    """Every metric that cells of each group have: a row for each label, a column for each metric."""
    tables = []
    for title, members in groups(cells).items():
        shown = [m for m in METRICS.values() if any(m.name in c["metrics"] for c in members)]
        rows, exact = (
            tuple(
                (line.name, line.protocol, *(_share(*line.metric(m.name), spec) for m in shown))
                for line in lines_of(members)
            )
            for spec in (".1f", ".4f")
        )
        lower = ", ".join(m.name for m in shown if m.better == "lower")
        note = f"In per cent; docs/reports.md has the formulas. Lower is better of {lower}. {PROTOCOLS}"
        columns = ("Strategy", "Task IDs", *(m.name for m in shown))
        tables.append(Table(f"Metrics: {title}", columns, rows, note, exact))
    return tables


def costs(cells: Sequence[Cell]) -> list[Table]:
    """What the cells of each group took: seconds by what they went into, tokens and memory, means over seeds."""
    tables = []
    for title, members in groups(cells).items():
        rows = tuple(_cost_row(line) for line in lines_of(members))
        columns = ("Strategy", "Task IDs", *(f"{kind.capitalize()} s" for kind in KINDS))
        columns += ("Total s", "Tokens", "Peak MiB", "Bytes alive", "Largest pack")
        tables.append(Table(f"Costs: {title}", columns, rows, COST_NOTE))
    return tables


def by_task(cells: Sequence[Cell]) -> list[Table]:
    """Each task of each group before any learning, once it was learned and at the end, with what was lost between."""
    tables = []
    for title, members in groups(cells).items():
        lines = lines_of(members)
        parts = ("base", "learned", "end", "Δ")
        columns = (
            "Strategy",
            "Task IDs",
            *(f"{task} {part}" for task in lines[0].tasks for part in parts),
        )
        rows, exact = (
            tuple((line.name, line.protocol, *_by_task(line, spec)) for line in lines)
            for spec in (".1f", ".4f")
        )
        note = f"In per cent, means over seeds. Δ: the end less just learned. {PROTOCOLS}{scored_by(members)}"
        tables.append(Table(f"By task: {title}", columns, rows, note, exact))
    return tables


def overview(cells: Sequence[Cell]) -> Table:
    """A row for each cell: what it is, its scores in per cent, how far it is and what it took."""
    columns = ("Strategy", "Task IDs", "Scenario", "Model", "Budget", "Seed", "OP", "BWT")
    rows, exact = (
        tuple(_overview_row(cell, spec) for cell in told_apart(cells)) for spec in (".1f", ".4f")
    )
    return Table("Cells", (*columns, "Experiences", "Of", "Seconds"), rows, PROTOCOLS, exact)


def experiences_done(cell: Cell) -> int:
    """Experiences of which anything was measured, the base model's among them."""
    return sum(any(score is not None for score in row) for row in cell["matrix"])


TABLES = {"ranking": ranking, "metrics": metrics, "costs": costs, "tasks": by_task}


def write_tables(cells: Sequence[Cell], folder: Path | str) -> list[Path]:
    """Writes every table of each group, and one of all cells, as Markdown, CSV and LaTeX; returns the files.

    The matrices of a group share one file, in CSV with their title as the first column. A file
    appears whole or not at all.
    """
    written = []
    for slug, members in slugged(groups(cells)):
        for name, make in TABLES.items():
            (table,) = make(members)
            written += table.write(Path(folder) / f"{slug}-{name}")
        tables = matrices(members)
        columns = max((table.columns for table in tables), key=len)
        joined = [
            (table.title, *row, *[UNMEASURED] * (len(columns) - len(row)))
            for table in tables
            for row in table.exact
        ]
        for name, text in {
            "matrices.md": "\n\n".join(table.markdown() for table in tables) + "\n",
            "matrices.csv": Table("", ("Matrix", *columns), tuple(joined)).csv(),
            "matrices.tex": "\n".join(table.latex() for table in tables),
            **_routing(members),
        }.items():
            written.append(write_atomic(Path(folder) / f"{slug}-{name}", text.encode()))
    return written + (overview(cells).write(Path(folder) / "cells-table") if cells else [])


def _routing(cells: Sequence[Cell]) -> dict[str, str]:
    """{end of a file's name: its text} of what was taken for what in one group; nothing where nothing was inferred."""
    if not any(map(inferred, cells)):
        return {}
    (table,), grids = accuracy(cells), confusion_tables(cells)
    return {
        "routing.md": table.markdown() + "\n",
        "routing.csv": table.csv(),
        "routing.tex": table.latex(),
        "confusion.md": "\n\n".join(grid.markdown() for grid in grids) + "\n",
        "confusion.csv": confusion_csv(cells),
        "confusion.tex": "\n".join(grid.latex() for grid in grids),
    }


def _share(mean: float, se: float, spec: str) -> str:
    return show(100.0 * mean, spec, 100.0 * se)


def _cost_row(line: Line) -> tuple[str, ...]:
    seconds, rest = line.costs()
    return (
        line.name,
        line.protocol,
        *(show(x, ",.1f") for x in seconds),
        *(show(x, ",.0f") for x in [*rest, *line.kept_bytes()]),
    )


def _ranking_row(line: Line, routed: bool, spec: str) -> tuple[str, ...]:
    scores = list(zip(line.mean[-1], line.stderr[-1], [spec] * len(line.tasks), strict=True))
    for key, how in (("op", spec), ("bwt", f"+{spec}"), ("fm", spec)):
        scores.append((*line.metric(key), how))
    scores.append((*line.drift(), f"+{spec}"))
    if routed:
        scores.append((*line.routing()[-1], spec))
    return (
        line.name,
        line.protocol,
        *(_share(mean, se, how) for mean, se, how in scores),
        show(line.storage(), ".2f"),
        *(show(x, ",.0f") for x in line.kept_bytes()),
        show(line.seconds()[0], ",.1f"),
        str(len(line.cells)) if line.complete else UNMEASURED,
    )


def _by_task(line: Line, spec: str) -> list[str]:
    return [
        show(100.0 * x, f"+{spec}" if k == 3 else spec)
        for parts in line.by_task()
        for k, x in enumerate(parts)
    ]


def _overview_row(cell: Cell, spec: str) -> tuple[str, ...]:
    scores = [100.0 * number(cell["metrics"].get(key)) for key in ("op", "bwt")]
    return (
        cell["label"],
        protocol(cell),
        *(str(cell[key]) for key in ("scenario", "model", "budget", "seed")),
        show(scores[0], spec),
        show(scores[1], f"+{spec}"),
        str(experiences_done(cell)),
        str(len(cell["matrix"])),
        show(number(cell.get("spent")), ",.1f"),
    )


def _matrix(
    title: str,
    columns: tuple[str, ...],
    mean: FloatArray,
    se: FloatArray,
    spec: str,
    note: str = "",
) -> Table:
    rows, exact = (
        tuple(
            (experience, *(show(x, digits, e) for x, e in zip(mean[i], se[i], strict=True)))
            for i, experience in enumerate(_experiences(columns[1 : len(mean)]))
        )
        for digits in (spec, ".4f")
    )
    return Table(title, columns, rows, note, exact)


def _experiences(tasks: Sequence[str]) -> list[str]:
    return ["base", *(f"after {task}" for task in tasks)]


def _not_measured_again(line: Line) -> str:
    """Which scores were not measured in these cells, since the fingerprint of the weights was known already."""
    known = np.all([cell["identical"] for cell in line.cells], axis=0)
    repeated = [
        f"{experience} ({', '.join(np.array(line.tasks)[row])})"
        for experience, row in zip(_experiences(line.tasks), known, strict=True)
        if row.any()
    ]
    if not repeated:
        return ""
    return f"Measured once, by another row or cell with the same fingerprint of weights: {'; '.join(repeated)}."
