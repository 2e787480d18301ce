"""Who stands where in a group: intervals over seeds, and each label against the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Protocol

from cl_graft.report import ReportedCell
from cl_graft.report.aggregate import Estimate, Line, lines_of
from cl_graft.report.examples import outcomes
from cl_graft.report.protocols import FREE, PARTS, PROTOCOLS, WHO
from cl_graft.report.statistics import (
    Difference,
    Interval,
    Strata,
    holm,
    over_both,
    over_normal,
    over_seeds,
    paired,
)
from cl_graft.report.table import UNMEASURED, Table, show
from cl_graft.store.digests import digest
from cl_graft.store.prompts import Asked, recall

ALPHA = 0.05
OVER_NOTE = (
    "Intervals of 95 %, each over what is said beside it. Seeds, examples: Student's t over seeds, put together with "
    "Wilson's limits over the test examples that seeds share (a bootstrap's where scores are not within 0 and 1). "
    "Examples: of one trained model. Seeds alone: of these test examples."
)
NOTE = (
    f"OP in per cent. {OVER_NOTE} Δ: less the best, with the 95 % interval and two-sided p of a paired "
    "hierarchical bootstrap (seeds, then test examples); * marks what is behind with p "
    "below 0.05 by two seeds or more. What one seed tells, its interval, Δ and p, says nothing of other seeds. No * is "
    "no proof of being as good. Methods that are told the task and methods that are not each have a best of their own, "
    "and a p after Holm among themselves: nothing is compared across. The best is one that holds the budget, if any "
    "does, and was chosen by the same scores, which favours it a little."
)


@dataclass(frozen=True)
class RankedLine:
    """A line of a group. behind: less the best of its protocol, p after Holm; None for the best and where nothing is
    paired.

    seeds: those that it or the best has, of which `behind` may have paired fewer. best: whether no line of its part is
    above it and one at least is below: where all are alike, or nobody scores at all, there is no best.
    """

    line: Line
    op: Interval | None
    behind: Difference | None = None
    seeds: int = 0
    best: bool = False

    @property
    def significant(self) -> bool:
        """Behind the best, and not by chance. The best by mean may be worse where both are paired."""
        d = self.behind
        return d is not None and d.seeds > 1 and d.mean < 0 and d.p < ALPHA


Tested = tuple[str, Strata]  # digest of the test examples, their scores at the end
Sample = dict[int, Tested]  # by seed


class Reader(Protocol):
    def __call__(
        self, reported: ReportedCell, task: str | None = None, base: bool = False
    ) -> Tested:
        """The test examples of one task, or of all as OP weighs them, and the cell's scores on them at the end.

        base: those before any learning instead.

        No scores where they are not on disk, or do not come to those that the cell recorded.
        """


def ranked_lines(
    members: Sequence[ReportedCell], tested: Callable[[ReportedCell], Tested]
) -> list[RankedLine]:
    """The lines of one group by part, in each the best OP first, incomplete ones last. tested: a `reader`."""
    lines = lines_of([member.cell for member in members])
    placed = {(f.cell["label"], f.cell["seed"]): f for f in members}
    samples: dict[str, Sample] = {}
    for line in lines:
        of_line = [placed[c["label"], c["seed"]] for c in line.cells if line.complete]
        samples[line.name] = {f.cell["seed"]: tested(f) for f in of_line}
    known = [RankedLine(line, op_interval(line, samples[line.name])) for line in lines]
    known.sort(
        key=lambda s: (
            PARTS.index(s.line.part),
            not s.line.complete,
            s.op is None,
            -s.op.mean if s.op else 0.0,
        )
    )
    together = groupby(known, key=lambda s: s.line.part.removesuffix(FREE))
    return [s for _, those in together for s in _compared(list(those), samples)]


def _compared(known: Sequence[RankedLine], samples: Mapping[str, Sample]) -> list[RankedLine]:
    """The lines of one protocol, each compared to the best of the first part that has one."""
    known = [s for _, those in groupby(known, lambda s: s.line.part) for s in _led(list(those))]
    best = next((s for s in known if s.op), None)
    if best is None:
        return known
    its = samples[best.line.name]
    behind = [None if s is best else difference(samples[s.line.name], its) for s in known]
    adjusted = holm([math.nan if d is None else d.p for d in behind])
    return [
        replace(s, behind=d and replace(d, p=p), seeds=len(samples[s.line.name].keys() | its))
        for s, d, p in zip(known, behind, adjusted, strict=True)
    ]


def _led(known: Sequence[RankedLine]) -> list[RankedLine]:
    """The lines of one part, with those marked that nothing is above."""
    means = [s.op.mean for s in known if s.op]
    top, apart = max(means, default=0.0), len(means) == 1 or len({*means}) > 1
    return [replace(s, best=bool(apart and top and s.op and s.op.mean == top)) for s in known]


def difference(one: Sample, other: Sample) -> Difference | None:
    """One minus the other over the seeds that both tested on the same examples; None where there is none."""
    pairs, tests = [], []
    for seed in sorted(one.keys() & other.keys()):
        (mine, a), (theirs, b) = one[seed], other[seed]
        sizes = [(w, x.size) for w, x in a]
        if mine == theirs and a and sizes == [(w, x.size) for w, x in b]:
            pairs.append([(w, x - y) for (w, x), (_, y) in zip(a, b, strict=True)])
            tests.append((mine, *sizes))
    return paired(pairs, tests) if pairs else None


def table(title: str, ranked: Sequence[RankedLine]) -> Table:
    """OP with its interval, and the difference to the best with its interval and p."""
    columns: tuple[str, ...] = (
        *WHO,
        "OP",
        "OP low",
        "OP high",
        "Interval over",
        "Δ",
        "Δ low",
        "Δ high",
        "p (Holm)",
    )
    columns += ("p < 0.05", "Seeds", "Seeds compared", "Examples compared")
    exact = tuple(_row(s, ".4f", "{:.6g}".format) for s in ranked)
    parts = tuple(s.line.part for s in ranked)
    rows = tuple(map(_row, ranked))
    return Table(f"Intervals: {title}", columns, rows, f"{NOTE} {PROTOCOLS}", exact, parts)


def reader() -> Reader:
    """Reads what was asked once for all cells of the same data, and the scores of a cell once for all its tasks.

    Where the prompts were not kept, the fingerprint of all the data stands for the examples.
    """

    @cache
    def asked(out: Path, data: str) -> dict[str, list[Asked]]:
        return recall(out, data)

    @cache
    def named(out: Path, data: str, tasks: tuple[str, ...]) -> str:
        kept = asked(out, data)
        if not all(task in kept for task in tasks):
            return data
        return digest([[[t, a.prompt, a.reference, a.suite] for a in kept[t]] for t in tasks])

    scored: dict[tuple[Path, bool], dict[str, Strata]] = {}

    def tested(reported: ReportedCell, task: str | None = None, base: bool = False) -> Tested:
        out, data = reported.path.parent, reported.cell.get("data", "")
        known, row = (reported.path, base), 0 if base else len(reported.cell["tasks"])
        if known not in scored:
            scored[known] = outcomes(reported.path, reported.cell, asked(out, data), row)
        scores = scored[known]
        if task is not None:
            return named(out, data, (task,)), scores.get(task, [])
        even = [(w / len(scores), x) for strata in scores.values() for w, x in strata]
        return named(out, data, tuple(reported.cell["tasks"])), even

    return tested


def op_interval(line: Line, sample: Sample) -> Interval | None:
    """Interval of a line's OP; None where that is unmeasured."""
    values = [cell["metrics"].get("op") for cell in line.cells]
    return interval(values, sample, line.metric("op")) if line.complete else None


def interval(values: Sequence[float | None], sample: Sample, known: Estimate) -> Interval | None:
    """Interval of a score, one value a seed, over seeds and test examples, or over the examples of a single seed.

    known: mean and standard error, which serve one seed where there are no such examples; several have an interval
    over seeds alone then. None where a seed is unmeasured.
    """
    measured = [v for v in values if v is not None]
    if not measured or len(measured) < len(values):
        return None
    tests, strata = zip(*sample.values(), strict=True) if sample else ((), ())
    if len(strata) == len(measured) and all(strata) and _alike(strata, tests):
        return over_both(strata, tests)
    return over_seeds(measured) if len(measured) > 1 else over_normal(*known)


def _alike(seeds: Sequence[Strata], tests: Sequence[str]) -> bool:
    """Whether test sets of one name have strata of one shape, without which nothing can be drawn for all seeds."""
    shapes = {
        (test, *((w, x.size) for w, x in strata)) for strata, test in zip(seeds, tests, strict=True)
    }
    return len(shapes) == len({*tests})


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _row(
    ranked: RankedLine, spec: str = ".1f", p: Callable[[float], str] = probability
) -> tuple[str, ...]:
    op, behind = ranked.op, ranked.behind
    shown = [UNMEASURED] * 4
    if op:
        shown = [*(show(100 * x, spec) for x in (op.mean, op.low, op.high)), op.over]
    told = [UNMEASURED] * 4
    if behind:
        told = [show(100 * x, f"+{spec}") for x in (behind.mean, behind.low, behind.high)]
        told.append(p(behind.p))
    counts = [str(behind.seeds), f"{behind.examples:,}"] if behind else [UNMEASURED] * 2
    seeds = str(len(ranked.line.cells)) if ranked.line.complete else UNMEASURED
    return (*ranked.line.who, *shown, *told, "*" if ranked.significant else "", seeds, *counts)
