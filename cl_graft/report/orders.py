"""One line a strategy over the orders in which a stream was learned: the field publishes averages over orders."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from cl_graft.report.aggregate import number, told_apart
from cl_graft.report.overview import Column, column_of, names_of
from cl_graft.report.protocols import PARTS, WHO, Cell, distinct, held, part, protocol
from cl_graft.report.statistics import over_seeds
from cl_graft.report.table import UNMEASURED, Table, show_interval

Order = tuple[str, ...]
NOTE = (
    "In per cent, of complete cells that were learned in all orders. An order's score is the mean over its seeds; the "
    "mean over orders has Student's 95 % interval over these, as if orders were drawn anew, for these tasks and test "
    "examples alone."
)


def over_orders(cells: Sequence[Cell]) -> dict[str, Table]:
    """{name of scenario, model and budget: table}, of each that was learned in several orders."""
    cells = told_apart(distinct(cells))
    names = names_of(cells)
    grouped: dict[Column, list[Cell]] = {}
    for cell in cells:
        if cell["complete"]:
            grouped.setdefault(column_of(cell), []).append(cell)
    return {
        names[column]: _table(names[column], members)
        for column, members in grouped.items()
        if len({_order(cell) for cell in members}) > 1
    }


def _order(cell: Cell) -> Order:
    return tuple(cell["tasks"])


def _table(title: str, cells: Sequence[Cell]) -> Table:
    called = {_order(cell): _called(cell) for cell in cells}
    lines: dict[tuple[str, str], dict[Order, list[Cell]]] = {}
    for cell in cells:
        by_order = lines.setdefault((part(cell), cell["label"]), {})
        by_order.setdefault(_order(cell), []).append(cell)
    shown = sorted(lines.items(), key=lambda line: PARTS.index(line[0][0]))
    columns = (*WHO, "OP", "BWT", "FM", *called.values(), "Seeds")
    rows, exact = (
        tuple(_row(label, by_order, list(called), digits) for (_, label), by_order in shown)
        for digits in (1, 4)
    )
    parts = tuple(where for (where, _), _ in shown)
    return Table(f"Over orders · {title}", columns, rows, NOTE, exact, parts)


def _called(cell: Cell) -> str:
    """The number of a published order, or its tasks."""
    options = cell.get("config", {}).get("options", {})
    given = [chosen["order"] for chosen in options.values() if "order" in chosen]
    if given and str(given[0]).isdigit():
        return f"Order {given[0]}"
    tasks = list(cell["tasks"])
    return " → ".join(tasks if len(tasks) < 6 else [*tasks[:2], "…", *tasks[-2:]])


def _row(
    label: str, by_order: dict[Order, list[Cell]], orders: Sequence[Order], digits: int
) -> tuple[str, ...]:
    first = next(iter(by_order.values()))[0]
    spec = f".{digits}f"

    def of(key: str) -> list[float]:
        return [_mean(by_order.get(o, []), lambda c: number(c["metrics"].get(key))) for o in orders]

    seeds = sorted({len({c["seed"] for c in members}) for members in by_order.values()})
    told = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    each = [UNMEASURED if math.isnan(x) else f"{100 * x:{spec}}" for x in of("op")]
    means = [_interval(of(key), spec) for key in ("op", "bwt", "fm")]
    return (label, protocol(first), held(first), *means, *each, told)


def _mean(cells: Sequence[Cell], value: Callable[[Cell], float]) -> float:
    return float(np.mean([value(cell) for cell in cells])) if cells else math.nan


def _interval(values: Sequence[float], spec: str) -> str:
    if any(map(math.isnan, values)):
        return UNMEASURED
    found = over_seeds(values)
    return show_interval([100 * x for x in (found.mean, found.low, found.high)], spec)
