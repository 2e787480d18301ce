"""Cells in groups, and the complete cells of a label as one line of a report.

A cell is the object that `cl-graft report DIR --json` prints. Cells of one scenario, model and budget form a group;
within it, the complete cells of a label are averaged over seeds, and an incomplete cell stands alone under a name that
says so. Methods that are told the task of a test prompt and methods that are not stand in parts of their own, and in
each of them those that may keep what they like. Scores are shares of 1. A mean over seeds of which one is unmeasured is
unmeasured.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.matrix import FloatArray, PerformanceMatrix, mean_stderr
from cl_graft.report.protocols import (
    GIVEN,
    PARTS,
    Cell,
    distinct,
    held,
    part,
    protocol,
    titled,
)
from cl_graft.report.table import UNMEASURED

T = TypeVar("T")
Estimate = tuple[float, float]  # a mean and its standard error; either may be NaN
ERRORS = (
    "±: one standard error over what its column says: over seeds, for these test examples alone; or over the test "
    "examples of one model."
)
PACKS, ROUTER, ALIKE = "each pack, mean", "router's choice", "one model"  # of `ability`
ABILITIES = (
    "General Δ: change of general ability from the base to the end, of what General of says: one model, where all "
    "prompts are answered alike; what the router chose for each prompt; or, of a method that is told the task, which a "
    "general prompt does not have, the mean over its packs, each on alone (one by one beside the matrices)."
)
SHORT = 8  # digits of a fingerprint that tell one base from another
KINDS = ("train", "compress", "evaluate", "harness")  # what a cell's seconds went into


class ReportError(CLGraftError, ValueError):
    """Cells of which no honest table can be made."""


@dataclass(frozen=True)
class Line:
    """One line of a report: a label's complete cells over seeds, or one incomplete cell.

    mean, stderr: float64 (T+1, T), scores as shares of 1; row 0 is the base model. stderr is over
    seeds where there are several, else the cell's own, over test examples; that of the base, which is
    one model for all seeds, is always over test examples.
    """

    name: str
    strategy: str
    complete: bool
    tasks: tuple[str, ...]
    cells: tuple[Cell, ...]
    mean: FloatArray
    stderr: FloatArray

    def over_seeds(self, value: Callable[[Cell], float]) -> Estimate:
        """Mean and standard error over the cells of one number per cell."""
        return estimate([value(cell) for cell in self.cells])

    def metric(self, key: str) -> Estimate:
        """A metric of the cells as a share of 1; unmeasured for an incomplete cell.

        OP of one seed takes its standard error from the test examples of its tasks, which are
        independent; the differences behind the other metrics are paired, so theirs is unknown.
        """
        if not self.complete:
            return math.nan, math.nan
        mean, se = self.over_seeds(lambda cell: number(cell["metrics"].get(key)))
        if key == "op" and len(self.cells) == 1:
            se = math.sqrt(float(np.sum(self.stderr[-1] ** 2))) / len(self.tasks)
        return mean, se

    def drift(self) -> Estimate:
        """Change of general ability from the base model to the end, of what `ability` says."""
        return self.over_seeds(lambda cell: general(cell)[-1] - general(cell)[0])

    @property
    def ability(self) -> str:
        """What `ability` says of its cells."""
        return ability(self.cells[0])

    def by_pack(self) -> list[tuple[str, Estimate]]:
        """General ability at the end with each task's pack on, alone; nothing where one model answers."""
        ends = [[number(x) for x in (c.get("general_packs") or [[]])[-1]] for c in self.cells]
        if not all(ends) or np.isnan(ends).all():
            return []
        return [
            (task, estimate(list(of)))
            for task, of in zip(self.tasks, zip(*ends, strict=True), strict=True)
        ]

    @property
    def protocol(self) -> str:
        """What `protocol` says of its cells."""
        return protocol(self.cells[0])

    @property
    def part(self) -> str:
        """The part of a table that it stands in, as `part`."""
        return part(self.cells[0])

    @property
    def who(self) -> tuple[str, str, str]:
        """What WHO asks: its name, its protocol, and the budget that it holds."""
        return self.name, self.protocol, held(self.cells[0])

    @property
    def errors(self) -> str:
        """What the standard errors of its scores are over."""
        return "seeds" if len(self.cells) > 1 else "examples"

    @property
    def title(self) -> str:
        """The name as `titled`."""
        return titled(self.name, self.cells[0])

    def routing(self) -> list[Estimate]:
        """The share of test examples of the tasks seen that a router took for their own, after each task."""
        each = [c.get("routing_accuracy") or [] for c in self.cells]
        places = range(1, len(self.tasks) + 1)
        return [estimate([number(a[k]) if k < len(a) else math.nan for a in each]) for k in places]

    def overhead(self) -> float:
        """Forward passes at the end over those of one pack that is named, on average over seeds."""
        return self.over_seeds(lambda c: number([None, *(c.get("overhead") or [])][-1]))[0]

    def kept_bytes(self) -> tuple[float, float]:
        """What is alive after the last task, and the largest pack that one task stored."""
        largest = self.over_seeds(lambda cell: max(packs(cell), default=math.nan))[0]
        return self.over_seeds(lambda cell: [math.nan, *alive(cell)][-1])[0], largest

    def seconds(self) -> list[float]:
        """Seconds of each of KINDS, on average over seeds."""
        return [
            self.over_seeds(lambda cell: number((cell.get("seconds") or {}).get(kind)))[0]  # noqa: B023
            for kind in KINDS
        ]

    def costs(self) -> tuple[list[float], list[float]]:
        """Seconds by KINDS and in all; tokens trained and peak memory in MiB."""
        spent = self.seconds()
        rest = ("tokens", "peak_memory_mb")
        return [*spent, sum(spent)], [self.over_seeds(lambda c: number(c.get(k)))[0] for k in rest]  # noqa: B023

    def by_task(self) -> list[tuple[float, float, float, float]]:
        """Scores of each task: before any learning, once it was learned, at the end, and the end less once learned."""
        ends = zip(self.mean[0], np.diagonal(self.mean, -1), self.mean[-1], strict=True)
        return [(float(b), float(k), float(e), float(e - k)) for b, k, e in ends]

    def storage(self) -> float:
        """The mean of what `storage` says of its cells."""
        return self.over_seeds(storage)[0]


def groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of each scenario, model and budget under a title, in order of first appearance, as `told_apart`.

    One scenario learned in two orders is two groups, whose titles then name the order.
    """
    grouped: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    for cell in told_apart(distinct(cells)):
        title = f"{cell['scenario']} · {cell['model']} · budget {cell['budget']}"
        grouped.setdefault((title, tuple(cell["tasks"])), []).append(cell)
    titles = [title for title, _ in grouped]
    return {
        title + (f" · {' → '.join(tasks)}" if titles.count(title) > 1 else ""): members
        for (title, tasks), members in grouped.items()
    }


def scored_by(cells: Sequence[Cell]) -> str:
    """A sentence on which scorer each figure is by, and its convention; cells of earlier versions did not keep it."""
    told: dict[tuple[str, str], list[str]] = {}
    for cell in cells:
        for task, scorers in (cell.get("conventions") or {}).items():
            for scorer in scorers.items():
                tasks = told.setdefault(scorer, [])
                tasks += [] if task in tasks else [task]
    parts = (
        f"{', '.join(tasks)} by {name}" + f" ({how})" * bool(how)
        for (name, how), tasks in told.items()
    )
    return f" Scored: {'; '.join(parts)}." if told else ""


def told_apart(cells: Sequence[Cell]) -> list[Cell]:
    """The cells; those of plugins whose names are alike are copies with as much of the path as tells which is which.

    `a/mine.py` and `b/mine.py`, both called mine, become a/mine and b/mine. Models of one name that are different
    weights have the fingerprint of these behind it.
    """
    weights: dict[str, set[str]] = {}
    for cell in cells:
        weights.setdefault(cell["model"], set()).add(cell.get("base", ""))
    apart = [
        {**c, "model": f"{c['model']} ({c.get('base', '')[:SHORT]})"}
        if len(weights[c["model"]]) > 1
        else c
        for c in cells
    ]
    for kind, shown in (("scenario", "scenario"), ("strategy", "label")):
        names = {c["config"][kind] for c in cells if "config" in c}
        called: dict[str, set[str]] = {}
        for name in names:
            called.setdefault(RunConfig.short(name), set()).add(name)
        for stem, alike in called.items():
            tails = _tails(alike) if len(alike) > 1 else {}
            for k, cell in enumerate(apart):
                tail = tails.get(cell["config"][kind], stem) if "config" in cell else stem
                name, bracket, options = cell[shown].partition("(")
                if tail != stem and name == stem:  # else it was told apart before
                    apart[k] = {**cell, shown: tail + bracket + options}
    return apart


def _tails(names: set[str]) -> dict[str, str]:
    """The shortest ends of these paths that differ; the paths where none do."""
    parts = {name: (Path(name).parent / RunConfig.short(name)).parts for name in names}
    for length in range(2, max(map(len, parts.values())) + 1):
        tails = {name: "/".join(those[-length:]) for name, those in parts.items()}
        if len(set(tails.values())) == len(names):
            return tails
    return {name: name for name in names}


def lines_of(cells: Sequence[Cell]) -> list[Line]:
    """The cells of one group as lines, by part; in each in order of first appearance, the incomplete ones last.

    Raises ReportError unless the cells are of one group, each seed of a label once.
    """
    grouped = groups(cells)
    titles = list(grouped)
    if len(titles) != 1:
        raise ReportError(
            f"the cells are of {len(titles)} groups ({'; '.join(titles) or 'there are no cells'}); "
            "give those of one scenario, model, budget and order of tasks."
        )
    complete: dict[str, list[Cell]] = {}
    incomplete: dict[str, list[Cell]] = {}
    seen: set[tuple[str, Any]] = set()
    for cell in grouped[titles[0]]:
        label, seed, tasks = cell["label"], cell["seed"], len(cell["tasks"])
        if (label, seed) in seen:
            raise ReportError(
                f"seed {seed} of {label} occurs twice in {titles[0]}; "
                "report on folders that hold each cell once."
            )
        seen.add((label, seed))
        done = sum(any(score is not None for score in row) for row in cell["matrix"][1:])
        name = f"{label} (incomplete: seed {seed}, {done} of {tasks} tasks)"
        if cell["complete"]:
            complete.setdefault(label, []).append(cell)
        else:
            incomplete[name] = [cell]
    lines = [_series(name, members) for name, members in (complete | incomplete).items()]
    return sorted(lines, key=lambda line: PARTS.index(line.part))


def slugged(grouped: Mapping[str, T]) -> Iterator[tuple[str, T]]:
    """The groups, each with a file name of its own in place of its title."""
    taken: set[str] = set()
    for title, members in grouped.items():
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", title.replace("%", "pct")).strip("-.")[:120]
        names = [stem, *(f"{stem}-{k}" for k in range(2, len(grouped) + 1))]
        slug = next(name for name in names if name.lower() not in taken)  # some disks fold case
        taken.add(slug.lower())
        yield slug, members


def general(cell: Cell) -> FloatArray:
    """General ability per experience, (T+1,), NaN where it was not measured."""
    measured = [number(x) for x in cell.get("general") or []]
    return np.array(measured + [math.nan] * (len(cell["tasks"]) + 1 - len(measured)))


def extra(cell: Cell, metric: str) -> FloatArray:
    """Another metric's matrix, (T+1, T); all NaN where this cell did not record it."""
    t = len(cell["tasks"])
    rows = (cell.get("extra_matrices") or {}).get(metric, [[None] * t] * (t + 1))
    return PerformanceMatrix(rows, cell["tasks"]).scores


def packs(cell: Cell) -> list[float]:
    """Bytes of the pack that each task stored."""
    return [number(size) for size in cell.get("pack_bytes") or []]


def ability(cell: Cell) -> str:
    """What a cell's general ability after its first task is of: PACKS, ROUTER or ALIKE; or that it is unmeasured."""
    if len(cell.get("general") or []) < 2 or None in cell["general"]:
        return UNMEASURED
    own = any(score is not None for row in cell.get("general_packs") or [] for score in row)
    if not own:
        return ALIKE
    return PACKS if cell["config"].get("task_ids", GIVEN) == GIVEN else ROUTER


def base_note(cells: Sequence[Cell]) -> str:
    """Which weights the base of a group is, and whether others go by its name in this report."""
    weights = cells[0].get("base", "")
    named = cells[0].get("config", {}).get("model", cells[0]["model"])
    if cells[0]["model"] == named:
        return f"Base: weights {weights[:SHORT]}." if weights else ""
    return (
        f"Base: weights {weights[:SHORT]}. Other weights are called {named}, too, in this report, as where it was made "
        "on another processor; their cells stand apart and are never averaged with these."
    )


def alive(cell: Cell) -> list[float]:
    """Bytes that are kept after each task: the packs that are still needed, and what the tasks share."""
    return [number(size) for size in cell.get("alive_bytes") or []]


def storage(cell: Cell) -> float:
    """Bytes alive after the last task, for each task learned, in per cent of the base model's bytes in bf16."""
    kept = alive(cell)
    return 100.0 * kept[-1] / (len(kept) * cell["base_bytes"]) if kept else math.nan


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and standard error; NaN of none."""
    return (
        (float(np.mean(values)), mean_stderr(list(values))) if len(values) else (math.nan, math.nan)
    )


def number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _series(name: str, cells: Sequence[Cell]) -> Line:
    first = cells[0]
    tasks = tuple(first["tasks"])
    read = [PerformanceMatrix(c["matrix"], tasks, stderr=c.get("stderr")) for c in cells]
    mean, stderr = average([m.scores for m in read])
    if len(read) == 1 and read[0].stderr is not None:
        stderr = read[0].stderr
    stderr = np.vstack([_base_error(read), stderr[1:]])
    return Line(name, first["strategy"], first["complete"], tasks, tuple(cells), mean, stderr)


def _base_error(seeds: Sequence[PerformanceMatrix]) -> FloatArray:
    """(T,): standard error over test examples of the base's mean scores; seeds that score alike share theirs."""
    errors = [np.full(len(m.tasks), np.nan) if m.stderr is None else m.stderr[0] for m in seeds]
    alike = np.ptp([m.scores[0] for m in seeds], axis=0) == 0
    return np.where(alike, errors[0], np.sqrt(np.sum(np.square(errors), axis=0)) / len(seeds))


def average(grids: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Mean and standard error over seeds of arrays of one shape; the error of one seed is NaN."""
    stack = np.stack(grids)
    if len(stack) == 1:
        return stack[0], np.full_like(stack[0], np.nan)
    return stack.mean(axis=0), stack.std(axis=0, ddof=1) / math.sqrt(len(stack))
