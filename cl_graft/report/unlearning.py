"""What unlearning a task did: how near the model without it is to the base, and what else was lost, in which time.

An experience that unlearns has the rows of the matrix before and after it; the forgotten task's row 0 is the base.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cl_graft.report.aggregate import ERRORS, Line, alive, extra, general, groups, lines_of, number
from cl_graft.report.protocols import PROTOCOLS, WHO, Cell
from cl_graft.report.table import Table, show

NOTE = (
    "Of the task unlearned, by each of its metrics: what the base scores, what the model scored before the experience "
    "that unlearns, and after it; as the base again is the aim, and higher is not better. Lost: what the tasks "
    "learned before it scored after that experience less before it, the mean over tasks, in per cent; General: the "
    "same of general ability, the mean over packs where each answers alone. Seconds of that experience without "
    "evaluation; bytes alive after it. Base itself: whether its "
    "prompts are then answered by the base's own weights, bit for bit, in every seed."
)


def unlearning(cells: Sequence[Cell]) -> list[Table]:
    """A table for each experience of each group that unlearns a task, a row a label; none where none does."""
    tables = []
    for title, members in groups(cells).items():
        lines = lines_of(members)
        for turn in lines[0].cells[0].get("unlearning") or []:
            shown = _metrics(lines, turn["of"])
            columns = [f"{m} {when}" for m in shown for when in ("base", "before", "after")]
            rows, exact = (
                tuple((*line.who, *_row(line, turn, shown, spec)) for line in lines)
                for spec in (".1f", ".4f")
            )
            parts = tuple(line.part for line in lines)
            head = (*WHO, *columns, "Base itself", "Lost", "General", "Seconds", "Bytes alive")
            note = f"{NOTE} {ERRORS} {PROTOCOLS}"
            tables.append(
                Table(f"Unlearning {turn['of']}: {title}", head, rows, note, exact, parts)
            )
    return tables


def _metrics(lines: Sequence[Line], task: str) -> list[str]:
    """score, and the further metrics that the task was measured by."""
    place = lines[0].tasks.index(task)
    cells = [cell for line in lines for cell in line.cells]
    names = sorted({m for cell in cells for m in cell.get("extra_matrices") or {}})
    measured = (m for m in names if not all(math.isnan(extra(c, m)[0][place]) for c in cells))
    return ["score", *measured]


def _row(line: Line, turn: dict[str, Any], shown: Sequence[str], spec: str) -> list[str]:
    place, row = line.tasks.index(turn["of"]), line.tasks.index(turn["task"]) + 1
    told = []
    for metric in shown:
        for k in (0, row - 1, row):
            scale, digits = (100.0, spec) if metric == "score" else (1.0, ".3f")
            mean, se = line.over_seeds(lambda c: _at(c, metric, k, place))  # noqa: B023
            told.append(show(scale * mean, digits, scale * (se if k else math.nan)))
    others = [k for k in range(row - 1) if k != place]

    def lost(cell: Cell) -> float:
        losses = [_at(cell, "score", row, k) - _at(cell, "score", row - 1, k) for k in others]
        return sum(losses) / len(losses) if losses else math.nan

    def ability(cell: Cell) -> float:
        grid = general(cell)
        return float(grid[row] - grid[row - 1])

    def spent(cell: Cell) -> float:
        return sum(t["seconds"] for t in cell["unlearning"] if t["task"] == turn["task"])

    done = [t for c in line.cells for t in c["unlearning"] if t["task"] == turn["task"]]
    same = all(t["base"] for t in done) and done
    for of in (lost, ability):
        mean, se = line.over_seeds(of)
        told.append(show(100.0 * mean, f"+{spec}", 100.0 * se))
    kept = line.over_seeds(lambda c: alive(c)[row - 1] if row <= len(alive(c)) else math.nan)[0]
    rest = [show(line.over_seeds(spent)[0], ",.1f"), show(kept, ",.0f")]
    return [*told[:-2], "yes" if same else "no", *told[-2:], *rest]


def _at(cell: Cell, metric: str, row: int, column: int) -> float:
    grid = cell["matrix"] if metric == "score" else extra(cell, metric)
    return number(grid[row][column]) if row < len(grid) else math.nan
