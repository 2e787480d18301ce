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
from cl_graft.report import divergence
from cl_graft.report.aggregate import (
    ABILITIES,
    ERRORS,
    KINDS,
    Line,
    average,
    base_note,
    extra,
    general,
    groups,
    lines_of,
    number,
    scored_by,
    slugged,
    told_apart,
)
from cl_graft.report.frequent import frequent_note
from cl_graft.report.orders import over_orders
from cl_graft.report.protocols import PARTS, PROTOCOLS, WHO, Cell, distinct, held, part, protocol
from cl_graft.report.quoted import quoted
from cl_graft.report.routing import accuracy, confusion_csv, confusion_tables, inferred
from cl_graft.report.table import UNMEASURED, Table, show, write_atomic
from cl_graft.report.unlearning import unlearning

BYTES_NOTE = (
    "Bytes alive: all that is kept after the last task, the packs still needed and what the tasks share. Largest pack: "
    "bytes of the largest pack that one task stored."
)
COST_NOTE = (
    "Means over seeds. Training counts for every cell that used it, shared or not; harness is what was neither "
    "training, generating nor compressing. Peak memory is that of the process. " + BYTES_NOTE
)
NOTE = (
    f"Scores, OP, BWT, FM and the change of general ability in per cent. {ERRORS} {BYTES_NOTE} Storage: bytes alive "
    f"over the tasks learned, in per cent of the base model in bf16. {ABILITIES} {PROTOCOLS}"
)
SPARED = ("Task IDs", "Budget", "General of", "±", "Largest pack")
BRIEF = "In per cent and bytes; ± is one standard error. The report's page has more columns, and says what each is."
PASSES_NOTE = (
    " Passes: forward passes of routing and answering the test examples of all tasks, over those of answering by one "
    "pack that is named."
)
ROUTING_NOTE = (
    " Routing: per cent of the test examples of all tasks that were taken for the task they are of."
)


def ranking(cells: Sequence[Cell]) -> list[Table]:
    """A table for each group: a row for each label, in each part the best OP first, incomplete cells last."""
    tables = []
    for title, members in groups(cells).items():
        lines = sorted(lines_of(members), key=_place)
        routed = any(map(inferred, members))
        columns = (*WHO, *lines[0].tasks, "OP", "BWT", "FM", "General Δ", "General of")
        columns += ("Routing",) if routed else ()
        columns += ("±", "Storage %", "Bytes alive", "Largest pack", "Train s", "Seeds")
        rows, exact = (
            tuple(_ranking_row(line, routed, spec) for line in lines) for spec in (".1f", ".4f")
        )
        note = f"{base_note(members)} {NOTE}".strip() + (ROUTING_NOTE if routed else "")
        note += frequent_note(members) + scored_by(members)
        brief = f"{base_note(members)} {BRIEF}".strip()
        parts = _parts(lines)
        tables.append(Table(f"Ranking: {title}", columns, rows, note, exact, parts, brief, SPARED))
    return tables


def _place(line: Line) -> tuple[int, bool, float]:
    """Where a line stands: by part, then whole before incomplete, then by OP."""
    return PARTS.index(line.part), not line.complete, _or_last(-line.metric("op")[0])


def _or_last(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _parts(lines: Sequence[Line]) -> tuple[str, ...]:
    return tuple(line.part for line in lines)


def matrices(cells: Sequence[Cell]) -> list[Table]:
    """The forgetting matrix of each label of each group: a row per experience, a column per task.

    General ability, where any cell of the group has it, is the last column, and where packs answer by themselves, a
    table of its own has it for each at the end. The other metrics that a cell recorded follow in tables of their own,
    in their own unit, with the error over seeds.
    """
    made = []
    for title, members in groups(cells).items():
        for line in lines_of(members):
            columns, mean, se = ("Experience", *line.tasks), line.mean, line.stderr
            if any(not np.isnan(general(cell)).all() for cell in members):
                ability, spread = average([general(cell) for cell in line.cells])
                spread[0] = math.nan  # of the base, which is one model
                mean, se = np.column_stack([mean, ability]), np.column_stack([se, spread])
                columns += ("General ability",)
            name, note = f"{title}: {line.title}", f"{ERRORS} {_not_measured_again(line)}".strip()
            note += scored_by(line.cells)
            over = ["examples", *[line.errors] * len(line.tasks)]
            made.append(_matrix(name, columns, 100.0 * mean, 100.0 * se, ".1f", note, over))
            made += _by_pack(name, line)
            for metric in sorted({m for c in line.cells for m in c.get("extra_matrices") or {}}):
                mean, se = average([extra(cell, metric) for cell in line.cells])
                name = f"{title}: {line.title}, {metric}"
                se[0] = math.nan
                over = ["", *[line.errors] * len(line.tasks)]
                made.append(_matrix(name, ("Experience", *line.tasks), mean, se, ".3f", "", over))
    return made


def _by_pack(name: str, line: Line) -> list[Table]:
    """General ability at the end with each pack of the line on, or none, and the difference to none."""
    found = line.by_pack()
    if not found:
        return []
    base = general(line.cells[0])[0]
    rows, exact = (
        (
            ("none (base)", show(100.0 * base, spec), UNMEASURED),
            *(
                (task, _share(mean, se, spec), show(100.0 * (mean - base), f"+{spec}"))
                for task, (mean, se) in found
            ),
        )
        for spec in (".1f", ".4f")
    )
    note = (
        "In per cent, at the end, with the pack on alone. ±: one standard error over seeds, for these test examples "
        "alone."
    )
    columns = ("Pack", "General ability", "General Δ")
    return [Table(f"{name}, general ability by pack", columns, rows, note, exact)]


def metrics(cells: Sequence[Cell]) -> list[Table]:
    """Every metric that cells of each group have: a row for each label, a column for each metric."""
    tables = []
    for title, members in groups(cells).items():
        shown = [m for m in METRICS.values() if any(m.name in c["metrics"] for c in members)]
        lines = lines_of(members)
        rows, exact = (
            tuple(
                (*line.who, *(_share(*line.metric(m.name), spec) for m in shown), line.errors)
                for line in lines
            )
            for spec in (".1f", ".4f")
        )
        lower = ", ".join(m.name for m in shown if m.better == "lower")
        note = f"In per cent; docs/reports.md has the formulas. Lower is better of {lower}. {ERRORS} {PROTOCOLS}"
        if of := {c["intransigence_of"] for c in members if "intransigence_of" in c}:
            note += f" Intransigence: against {' and '.join(sorted(of))} of the same seed."
        columns = (*WHO, *(m.name for m in shown), "±")
        tables.append(Table(f"Metrics: {title}", columns, rows, note, exact, _parts(lines)))
    return tables


def costs(cells: Sequence[Cell]) -> list[Table]:
    """What the cells of each group took: seconds by what they went into, tokens and memory, means over seeds."""
    tables = []
    for title, members in groups(cells).items():
        lines, routed = lines_of(members), any(map(inferred, members))
        rows = tuple(_cost_row(line, routed) for line in lines)
        columns = (*WHO, *(f"{kind.capitalize()} s" for kind in KINDS))
        columns += ("Total s", "Tokens", "Peak MiB", "Bytes alive", "Largest pack")
        columns += ("Passes",) if routed else ()
        note = COST_NOTE + (PASSES_NOTE if routed else "")
        tables.append(Table(f"Costs: {title}", columns, rows, note, parts=_parts(lines)))
    return tables


def by_task(cells: Sequence[Cell]) -> list[Table]:
    """Each task of each group before any learning, once it was learned and at the end, with what was lost between."""
    tables = []
    for title, members in groups(cells).items():
        lines = lines_of(members)
        parts = ("base", "learned", "end", "Δ")
        columns = (*WHO, *(f"{task} {part}" for task in lines[0].tasks for part in parts))
        rows, exact = (
            tuple((*line.who, *_by_task(line, spec)) for line in lines) for spec in (".1f", ".4f")
        )
        note = f"In per cent, means over seeds. Δ: the end less just learned. {PROTOCOLS}"
        note += frequent_note(members) + scored_by(members)
        tables.append(Table(f"By task: {title}", columns, rows, note, exact, _parts(lines)))
    return tables


def all_cells(cells: Sequence[Cell]) -> Table:
    """A row for each cell: what it is, its scores in per cent, how far it is and what it took."""
    columns = (*WHO, "Scenario", "Model", "Seed", "OP", "BWT", "Experiences", "Of", "Seconds")
    shown = told_apart(distinct(cells))
    shown.sort(key=lambda cell: PARTS.index(part(cell)))
    rows, exact = (tuple(_cell_row(cell, spec) for cell in shown) for spec in (".1f", ".4f"))
    return Table("Cells", columns, rows, PROTOCOLS, exact, tuple(map(part, shown)))


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
        for table, turn in zip(
            unlearning(members), members[0].get("unlearning") or [], strict=False
        ):
            written += table.write(Path(folder) / f"{slug}-{turn['task']}")
        for table in quoted(members):
            written += table.write(Path(folder) / f"{slug}-quoted")
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
            **divergence.files(members),
        }.items():
            written.append(write_atomic(Path(folder) / f"{slug}-{name}", text.encode()))
    for name, over in slugged(over_orders(cells)):
        written += over.write(Path(folder) / f"{name}-orders")
    return written + (all_cells(cells).write(Path(folder) / "cells-table") if cells else [])


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


def _cost_row(line: Line, routed: bool) -> tuple[str, ...]:
    seconds, rest = line.costs()
    return (
        *line.who,
        *(show(x, ",.1f") for x in seconds),
        *(show(x, ",.0f") for x in [*rest, *line.kept_bytes()]),
        *([show(line.overhead(), ".2f")] if routed else []),
    )


def _ranking_row(line: Line, routed: bool, spec: str) -> tuple[str, ...]:
    scores = list(zip(line.mean[-1], line.stderr[-1], [spec] * len(line.tasks), strict=True))
    for key, how in (("op", spec), ("bwt", f"+{spec}"), ("fm", spec)):
        scores.append((*line.metric(key), how))
    shown = [_share(mean, se, how) for mean, se, how in scores]
    shown += [_share(*line.drift(), f"+{spec}"), line.ability]
    if routed:
        shown.append(_share(*line.routing()[-1], spec))
    return (
        *line.who,
        *shown,
        line.errors,
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


def _cell_row(cell: Cell, spec: str) -> tuple[str, ...]:
    scores = [100.0 * number(cell["metrics"].get(key)) for key in ("op", "bwt")]
    return (
        cell["label"],
        protocol(cell),
        held(cell),
        *(str(cell[key]) for key in ("scenario", "model", "seed")),
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
    note: str,
    over: Sequence[str],
) -> Table:
    """over: what the standard errors of each row are over, which the last column says."""
    rows, exact = (
        tuple(
            (
                experience,
                *(show(x, digits, e) for x, e in zip(mean[i], se[i], strict=True)),
                over[i],
            )
            for i, experience in enumerate(_experiences(columns[1 : len(mean)]))
        )
        for digits in (spec, ".4f")
    )
    return Table(title, (*columns, "±"), rows, note, exact)


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
