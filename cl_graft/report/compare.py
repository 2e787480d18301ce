"""What differs between two runs: config, versions, machine, data, and scores with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import Found, find
from .series import Cell
from .standing import Sample, difference, probability, reader
from .statistics import Difference
from .table import UNMEASURED, Table, show

ABOUT = ("config", "options", "versions", "machine", "data", "tasks", "budget_bytes", "base_bytes")
NAMES = ("scenario", "label", "model", "budget", "seed")
NOTE = (
    "In per cent, B less A, with the 95 % interval and two-sided p of a paired hierarchical bootstrap "
    "(seeds, then test examples) over the seeds that both ran on the same data."
)


def compare(a: Path, b: Path) -> list[Table]:
    """Cells of two folders side by side: by scenario, strategy, model, budget and seed, or the only cell of each.

    Raises CLGraftError where a folder holds no cell.
    """
    ours, theirs = find([a]), find([b])
    pairs, alone = _matched(ours, theirs)
    tables = [_cells(alone)] if alone[0] or alone[1] else []
    tables.append(_about([(x.cell, y.cell) for x, y in pairs]))
    return [*tables, _scores(pairs)]


def flattened(value: Any, name: str = "") -> dict[str, Any]:
    """{dotted name: value} of what is not a mapping."""
    if not isinstance(value, Mapping) or not value:
        return {name: value}
    found: dict[str, Any] = {}
    for key, part in value.items():
        found |= flattened(part, f"{name}.{key}" if name else str(key))
    return found


Pairs = list[tuple[Found, Found]]


def _matched(
    ours: Sequence[Found], theirs: Sequence[Found]
) -> tuple[Pairs, tuple[list[Found], list[Found]]]:
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])], ([], [])
    other = {_key(f.cell): f for f in theirs}
    pairs = [(f, other[_key(f.cell)]) for f in ours if _key(f.cell) in other]
    used = {_key(f.cell) for f, _ in pairs}
    left = [[f for f in those if _key(f.cell) not in used] for those in (ours, theirs)]
    return pairs, (left[0], left[1])


def _key(cell: Cell) -> tuple[Any, ...]:
    return tuple(cell[name] for name in NAMES)


def _cells(alone: tuple[list[Found], list[Found]]) -> Table:
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
        a, b = (flattened({k: cell.get(k) for k in ABOUT}) for cell in (one, other))
        for name in {**a, **b}:
            if a.get(name, ...) != b.get(name, ...):
                told = (name, _text(a.get(name, ...)), _text(b.get(name, ...)))
                counts[told] = counts.get(told, 0) + 1
    rows = tuple((*told, str(count)) for told, count in counts.items())
    note = "" if rows else "Config, options, versions, machine and data are the same."
    return Table(
        f"What differs between {len(pairs)} cells and theirs",
        ("What", "A", "B", "Cells"),
        rows,
        note,
    )


def _scores(pairs: Pairs) -> Table:
    """OP of A and B for each strategy, and of each task where both have it, with the paired difference of OP."""
    groups: dict[str, Pairs] = {}
    for one, other in pairs:
        groups.setdefault(_title(one.cell), []).append((one, other))
    examples, rows = reader(), []
    for title, members in groups.items():
        whole = [(x, y) for x, y in members if x.cell["complete"] and y.cell["complete"]]
        samples: list[Sample] = [
            {p[0].cell["seed"]: (p[side].cell.get("data", ""), examples(p[side])) for p in whole}
            for side in (0, 1)
        ]
        found = difference(samples[1], samples[0])
        means = [_mean([p[side].cell["metrics"]["op"] for p in whole]) for side in (0, 1)]
        rows.append((title, *means, *_told(found), str(len(whole))))
    columns = ("Cell", "OP of A", "OP of B", "B - A", "low", "high", "p", "Seeds")
    return Table("Scores", columns, tuple(rows), NOTE)


def _told(found: Difference | None) -> list[str]:
    if found is None:
        return [UNMEASURED] * 4
    shown = [show(100 * x, "+.1f") for x in (found.mean, found.low, found.high)]
    return [*shown, probability(found.p)]


def _mean(values: Sequence[float | None]) -> str:
    known = [v for v in values if v is not None]
    return show(100 * sum(known) / len(known), ".1f") if known else UNMEASURED


def _title(cell: Cell) -> str:
    return f"{cell['scenario']} · {cell['label']} · {cell['model']} · {cell['budget']}"


def _text(value: Any) -> str:
    return UNMEASURED if value is ... else str(value)
