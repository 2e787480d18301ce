"""What differs between two runs: config, versions, machine, data, and scores with intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cl_graft.report import ReportedCell, find
from cl_graft.report.aggregate import lines_of
from cl_graft.report.protocols import GIVEN, Cell, protocol
from cl_graft.report.significance import (
    OVER_NOTE,
    Reader,
    Sample,
    difference,
    interval,
    op_interval,
    probability,
    reader,
)
from cl_graft.report.statistics import Difference, Interval, holm
from cl_graft.report.table import UNMEASURED, Table, show, show_interval

ABOUT = (
    *("config", "options", "versions", "code", "machine", "data", "tasks"),
    *("budget_bytes", "base", "base_bytes"),  # base: fingerprint of its weights
)
NAMES = ("scenario", "label", "model", "budget", "seed")
ACROSS = "one is told the task at test and the other is not"
NOTE = (
    "In per cent, means over the seeds that both completed. "
    + OVER_NOTE
    + " B - A of OP and of each task at the end with "
    "the interval and two-sided p of a paired hierarchical bootstrap (seeds, then test examples) over the seeds that "
    "both tested on the same examples; a p of one seed says nothing of others. p after Holm among all rows of the "
    "table; the intervals are each of its row alone. BWT, FM and Routing (test examples taken for the task they are "
    "of, where both inferred it) are not tested. Bytes alive: all that is kept after the last task, in bytes."
)


def compare(a: Path, b: Path, left_out: Callable[[str], None] = warnings.warn) -> list[Table]:
    """Cells of two folders side by side: by scenario, strategy, model, budget and seed, or the only cell of each.

    left_out: as `find` tells it. Raises CLGraftError where a folder holds no cell.
    """
    ours, theirs = find([a], left_out), find([b], left_out)
    pairs, alone = _matched(ours, theirs)
    tables = [_cells(alone)] if alone[0] or alone[1] else []
    tables.append(_about([(x.cell, y.cell) for x, y in pairs]))
    return [*tables, _scores(pairs)] if pairs else tables


def flattened(value: Any, name: str = "") -> dict[str, Any]:
    """{dotted name: value} of what is not a mapping."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    flat: dict[str, Any] = {}
    for key, part in value.items():
        flat |= flattened(part, f"{name}.{key}" if name else str(key))
    return flat


Pairs = list[tuple[ReportedCell, ReportedCell]]


def _matched(
    ours: Sequence[ReportedCell], theirs: Sequence[ReportedCell]
) -> tuple[Pairs, tuple[list[ReportedCell], list[ReportedCell]]]:
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])], ([], [])
    other = {_key(f.cell): f for f in theirs}
    pairs = [(f, other[_key(f.cell)]) for f in ours if _key(f.cell) in other]
    used = {_key(f.cell) for f, _ in pairs}
    left = [[f for f in those if _key(f.cell) not in used] for those in (ours, theirs)]
    return pairs, (left[0], left[1])


def _key(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[name] for name in NAMES)


def _cells(alone: tuple[list[ReportedCell], list[ReportedCell]]) -> Table:
    rows = tuple(
        (_title(f.cell), str(f.cell["seed"]), side)
        for side, those in zip("AB", alone, strict=True)
        for f in those
    )
    return Table("Cells of one run alone", ("Cell", "Seed", "In"), rows)


def _about(pairs: Sequence[tuple[Cell, Cell]]) -> Table:
    """A row for each two values that differ, with the number of pairs of cells that differ so."""
    counts: dict[tuple[str, str, str], int] = {}
    for one, other in pairs:
        a, b = (
            flattened({k: cell.get(k) for k in ABOUT} | {"task IDs at test": protocol(cell)})
            for cell in (one, other)
        )
        for name in {**a, **b}:
            if a.get(name, ...) != b.get(name, ...):
                told = (name, _text(a.get(name, ...)), _text(b.get(name, ...)))
                counts[told] = counts.get(told, 0) + 1
    rows = tuple((*told, str(count)) for told, count in counts.items())
    note = (
        ""
        if rows
        else "Config, options, versions, code, machine, data and base model are the same."
    )
    if not pairs:
        note = "No cell of A has its like in B (scenario, strategy, model, budget and seed), so nothing is compared."
    return Table(
        f"What differs between {len(pairs)} cells and theirs",
        ("What", "A", "B", "Cells"),
        rows,
        note,
    )


def _scores(pairs: Pairs) -> Table:
    """OP, BWT, FM and each task's final score of A and B for each strategy, with the paired differences."""
    groups: dict[tuple[str, ...], Pairs] = {}
    for one, other in pairs:
        key = (_title(one.cell), *one.cell["tasks"], "", *other.cell["tasks"])
        groups.setdefault(key, []).append((one, other))
    tested, rows, untold = reader(), list[_Row](), []
    for (title, *_), members in groups.items():
        whole = [(x, y) for x, y in members if x.cell["complete"] and y.cell["complete"]]
        if not whole:
            rows.append(_Row(title, "OP", UNMEASURED, UNMEASURED, "", UNMEASURED, "0", UNMEASURED))
            untold.append(f"{title} (not complete in both)")
            continue
        a, b = (_side([pair[k] for pair in whole], tested) for k in (0, 1))
        across = len({protocol(f.cell) == GIVEN for pair in whole for f in pair}) > 1
        for name in (name for name in a if name in b):
            (x, ours), (y, theirs) = a[name], b[name]
            paired = None if across else difference(theirs, ours)
            if name == "OP" and (paired is None or paired.seeds < len(whole)):
                untold.append(f"{title} ({ACROSS if across else _why_not(ours, theirs)})")
            less = _less(y, x) if paired is None else _told(paired, "+.1f")
            row = _Row(
                title, name, _told(x), _told(y), x.over if x else "", less, _seeds(paired, whole)
            )
            untested, p = UNMEASURED if ours else "", paired.p if paired else math.nan
            rows.append(replace(row, untested=untested, p=p))
        a_bytes, b_bytes, less = _bytes(whole)
        rows.append(_Row(title, "Bytes alive", a_bytes, b_bytes, "", less, str(len(whole))))
    note = f"{NOTE} Not paired: {'; '.join(untold)}." if untold else NOTE
    columns = ("Cell", "Score", "A", "B", "Interval over", "B - A", "p (Holm)", "Seeds")
    adjusted = holm([row.p for row in rows])
    shown = tuple(row.shown(p) for row, p in zip(rows, adjusted, strict=True))
    return Table("Scores", columns, shown, note)


@dataclass(frozen=True)
class _Row:
    """A row of the scores. p: before it is corrected, NaN for none, in whose place `untested` stands."""

    title: str
    name: str
    a: str
    b: str
    over: str
    less: str
    seeds: str
    untested: str = ""
    p: float = math.nan

    def shown(self, p: float) -> tuple[str, ...]:
        told = self.untested if math.isnan(p) else probability(p)
        return self.title, self.name, self.a, self.b, self.over, self.less, told, self.seeds


def _side(
    cells: Sequence[ReportedCell], tested: Reader
) -> dict[str, tuple[Interval | None, Sample]]:
    """{OP, BWT, FM, each task and Routing: its interval, and the test examples behind it, of OP and the tasks alone}.

    Routing is there where it was measured.
    """
    line = lines_of([f.cell for f in cells])[0]
    sample = {f.cell["seed"]: tested(f) for f in cells}
    measured: dict[str, tuple[Interval | None, Sample]] = {
        "OP": (op_interval(line, sample), sample)
    }
    for key in ("bwt", "fm"):
        values = [cell["metrics"].get(key) for cell in line.cells]
        measured[key.upper()] = (interval(values, {}, line.metric(key)), {})
    for j, task in enumerate(line.tasks):
        values = [cell["matrix"][-1][j] for cell in line.cells]
        sample = {f.cell["seed"]: tested(f, task) for f in cells}
        known = (float(line.mean[-1, j]), float(line.stderr[-1, j]))
        measured[task] = (interval(values, sample, known), sample)
    if told := interval([c["routing_accuracy"][-1] for c in line.cells], {}, line.routing()[-1]):
        measured["Routing"] = (told, {})
    return measured


def _bytes(whole: Pairs) -> tuple[str, str, str]:
    """Bytes alive after the last task of A and B, means over seeds, and B - A."""
    a, b = (lines_of([pair[k].cell for pair in whole])[0].kept_bytes()[0] for k in (0, 1))
    return show(a, ",.0f"), show(b, ",.0f"), show(b - a, "+,.0f")


def _why_not(one: Sample, other: Sample) -> str:
    if not one.keys() & other.keys():
        return "their seeds differ"
    if any(not scores for sample in (one, other) for _, scores in sample.values()):
        return "the outcomes of its test examples are not on disk, or do not come to its scores"
    return "its test examples differ"


def _seeds(paired: Difference | None, whole: Pairs) -> str:
    """The number of seeds that were paired, and of how many if not of all."""
    if paired is None or paired.seeds == len(whole):
        return str(len(whole))
    return f"{paired.seeds} of {len(whole)}"


def _less(b: Interval | None, a: Interval | None) -> str:
    return UNMEASURED if a is None or b is None else show(100 * (b.mean - a.mean), "+.1f")


def _told(measured: Interval | Difference | None, spec: str = ".1f") -> str:
    if measured is None:
        return UNMEASURED
    return show_interval([100 * x for x in (measured.mean, measured.low, measured.high)], spec)


def _title(cell: Cell) -> str:
    return f"{cell['scenario']} · {cell['label']} · {cell['model']} · {cell['budget']}"


def _text(value: Any) -> str:
    return UNMEASURED if value is ... else str(value)
