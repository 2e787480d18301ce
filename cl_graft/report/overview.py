"""Where each strategy stands in all scenarios, models and budgets together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cl_graft.config import RunConfig
from cl_graft.report import ReportedCell
from cl_graft.report.protocols import PARTS, PROTOCOLS, WHO, Cell, distinct, part, protocol
from cl_graft.report.significance import OVER_NOTE, Reader, Sample, Tested, interval
from cl_graft.report.statistics import Interval, over_one_model, over_seeds
from cl_graft.report.table import UNMEASURED, Table, show_interval
from cl_graft.store.digests import digest

BASE = "base model"
NOTE = (
    "OP in per cent, of complete cells. A scenario that was learned in several orders of its tasks is there once, by "
    f"the mean over them. {OVER_NOTE} The base is one model, so its intervals are over examples. Rank: 1 for the best "
    "OP, ties share theirs; the mean over the cells (scenario, order, model, budget, seed) that all of a part have, "
    f"with Student's interval over those, of these test examples. {PROTOCOLS}"
)

Column = tuple[str, str, str]  # scenario whatever its order of tasks, model, budget
Found = dict[
    tuple[Column, tuple[str, ...], int], ReportedCell
]  # by column, order of tasks, and seed


@dataclass(frozen=True)
class Standing:
    """A row: a strategy, or the base, with its OP by column. rank: the mean of its ranks in so many cells."""

    part: str
    who: tuple[str, str, str]
    scores: Sequence[Interval | None]
    rank: Interval | None = None
    ranked: int = 0

    def row(self, digits: int) -> tuple[str, ...]:
        shown = UNMEASURED
        if self.rank:
            shown = show_interval([self.rank.mean, self.rank.low, self.rank.high], f".{digits}f")
        scores = [_per_cent(score, f".{digits}f") for score in self.scores]
        over = "; ".join(dict.fromkeys(s.over for s in self.scores if s and s.over))
        return (*self.who, shown, str(self.ranked or UNMEASURED), *scores, over)


def overview(reported: Sequence[ReportedCell], tested: Reader) -> Table:
    """A row for each strategy, in each part the best mean rank first; a column for each scenario, model and budget."""
    kept = {id(cell) for cell in distinct([f.cell for f in reported])}
    found = [f for f in reported if id(f.cell) in kept]
    names = names_of([f.cell for f in found])
    standings = standings_of(found, list(names), tested)
    columns = (*WHO, "Rank", "Cells ranked", *names.values(), "Interval over")
    rows, exact = (tuple(s.row(digits) for s in standings) for digits in (1, 4))
    return Table("Overview", columns, rows, NOTE, exact, tuple(s.part for s in standings))


def standings_of(
    found: Sequence[ReportedCell], columns: Sequence[Column], tested: Reader
) -> list[Standing]:
    """The base, and every strategy that has a complete cell."""
    by_label: dict[tuple[str, str], Found] = {}
    for f in found:
        if f.cell["complete"]:
            place = (column_of(f.cell), tuple(f.cell["tasks"]), f.cell["seed"])
            by_label.setdefault((part(f.cell), f.cell["label"]), {})[place] = f
    orders = {c: {tuple(f.cell["tasks"]) for f in found if column_of(f.cell) == c} for c in columns}
    standings = []
    for (where, label), cells in by_label.items():
        first = next(iter(cells.values())).cell
        who = (label, protocol(first), "held" if first["budgeted"] else "none")
        scores = [_score(cells, c, orders[c], tested) for c in columns]
        rivals = {name: those for (other, name), those in by_label.items() if other == where}
        standings.append(Standing(where, who, scores, *_rank(label, rivals)))
    standings.sort(key=_place)
    base = [base_interval([f for f in found if column_of(f.cell) == c], tested) for c in columns]
    return [Standing("", (BASE, UNMEASURED, UNMEASURED), base), *standings]


def base_interval(found: Iterable[ReportedCell], tested: Reader) -> Interval | None:
    """The base model's mean score over tasks, over the test examples of all seeds."""
    by_seed: dict[int, Tested] = {}
    means: dict[int, float] = {}
    for f in found:
        seed, row = f.cell["seed"], f.cell["matrix"][0]
        if seed not in by_seed and None not in row:
            by_seed[seed], means[seed] = tested(f, base=True), float(np.mean(row))
    if not means:
        return None
    tests, strata = zip(*by_seed.values(), strict=True)
    if all(strata):
        return over_one_model(strata, tests)
    return Interval(float(np.mean(list(means.values()))), math.nan, math.nan)


def _score(
    cells: Found, column: Column, orders: set[tuple[str, ...]], tested: Reader
) -> Interval | None:
    """OP over the seeds that were learned in all orders."""
    mine: dict[int, list[ReportedCell]] = {}
    for (where, _, seed), f in cells.items():
        if where == column:
            mine.setdefault(seed, []).append(f)
    whole = {seed: those for seed, those in mine.items() if len(those) == len(orders)}
    ops = {s: [f.cell["metrics"].get("op") for f in those] for s, those in whole.items()}
    values = [None if None in those else float(np.mean(those)) for those in ops.values()]
    sample: Sample = {seed: _mean_over_orders(those, tested) for seed, those in whole.items()}
    known = [v for v in values if v is not None]
    return interval(values, sample, (float(np.mean(known)) if known else math.nan, math.nan))


def _mean_over_orders(cells: Sequence[ReportedCell], tested: Reader) -> Tested:
    """What names the test examples of a seed, and their mean scores over its orders, task by task.

    No scores where those were not tested on the same examples.
    """
    tasks = sorted(cells[0].cell["tasks"])
    read = [[tested(f, task) for task in tasks] for f in cells]
    names = [[name for name, _ in those] for those in read]
    if any(names[0] != other for other in names) or not all(s for those in read for _, s in those):
        return "", []
    parts = [zip(*(those[j][1] for those in read), strict=True) for j in range(len(tasks))]
    return digest(names[0]), [
        (same[0][0] / len(tasks), np.mean([x for _, x in same], axis=0))
        for each in parts
        for same in each
    ]


def _rank(label: str, rivals: Mapping[str, Found]) -> tuple[Interval | None, int]:
    """Mean rank by OP in the cells that all have, and how many those are; none for who is alone."""
    common = set.intersection(*(set(cells) for cells in rivals.values()))
    ops = {
        name: [cells[place].cell["metrics"].get("op") for place in sorted(common)]
        for name, cells in rivals.items()
    }
    if len(rivals) < 2 or not common or any(None in those for those in ops.values()):
        return None, 0
    scores, mine = np.array(list(ops.values())), np.array(ops[label])
    ranks = (scores > mine).sum(axis=0) + ((scores == mine).sum(axis=0) + 1) / 2
    if len(ranks) == 1:
        return Interval(float(ranks[0]), math.nan, math.nan), 1
    found = over_seeds(ranks)
    low, high = max(found.low, 1.0), min(found.high, float(len(rivals)))
    return Interval(found.mean, low, high), len(ranks)


def _place(standing: Standing) -> tuple[int, float, float]:
    means = [s.mean for s in standing.scores if s]
    rank = standing.rank.mean if standing.rank else math.inf
    return PARTS.index(standing.part), rank, -float(np.mean(means)) if means else math.inf


def column_of(cell: Cell) -> Column:
    """The column of a cell: one for all orders of the same tasks."""
    return _scenario(cell), cell["model"], cell["budget"]


def _scenario(cell: Cell) -> str:
    """The scenario without the option that says the order of its tasks, but with the tasks."""
    name, rest = _unordered(cell)
    return digest(name, rest, sorted(cell["tasks"]))


def _unordered(cell: Cell) -> tuple[str, dict[str, Any]]:
    """The scenario's name, and its options but for the order of its tasks: `order`, or a list of them as it is."""
    config = cell.get("config", {})
    name = config.get("scenario", cell["scenario"])
    options = config.get("options", {}).get(RunConfig.short(name), {})
    unordered = {
        k: v for k, v in options.items() if k != "order" and not _is_order(v, cell["tasks"])
    }
    return name, unordered


def _is_order(value: Any, tasks: Sequence[str]) -> bool:
    return (value.split(",") if isinstance(value, str) else value) == list(tasks)


def names_of(cells: Sequence[Cell]) -> dict[Column, str]:
    """What each column is called, by what tells it from the others; a scenario with its number of orders."""
    columns: dict[Column, list[Cell]] = {}
    for cell in cells:
        columns.setdefault(column_of(cell), []).append(cell)
    several = [len({c[k] for c in columns}) > 1 for k in range(3)]
    named = {}
    for column, members in columns.items():
        orders = len({tuple(cell["tasks"]) for cell in members})
        name = members[0]["scenario"]
        if orders > 1:
            short, rest = _unordered(members[0])
            told = ", ".join(f"{k}={v}" for k, v in sorted(rest.items()))
            name = f"{RunConfig.short(short)}{f'({told})' if told else ''}, {orders} orders"
        further = (part for part, differ in zip(column[1:], several[1:], strict=True) if differ)
        named[column] = " · ".join([name, *further])
    return named


def _per_cent(score: Interval | None, spec: str) -> str:
    if score is None:
        return UNMEASURED
    return show_interval([100 * x for x in (score.mean, score.low, score.high)], spec)
