"""Who stands where in a group: intervals over seeds, and each label against the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Protocol

from cl_graft.report import ReportedCell
from cl_graft.report.aggregate import PROTOCOLS, Estimate, Line, lines_of
from cl_graft.report.examples import final
from cl_graft.report.statistics import (
    Difference,
    Interval,
    Strata,
    holm,
    over_examples,
    over_normal,
    over_seeds,
    paired,
)
from cl_graft.report.table import UNMEASURED, Table, show
from cl_graft.store.digests import digest
from cl_graft.store.prompts import Asked, recall

ALPHA = 0.05
NOTE = (
    "OP in per cent with its 95 % interval: Student's t over seeds; for one seed Wilson's limits over test examples, "
    "or a bootstrap where scores are not 0 or 1. Δ: less the best, with the 95 % interval and two-sided p of a paired "
    "hierarchical bootstrap (seeds, then test examples), p after Holm within the group; * marks what is behind with p "
    "below 0.05 by two seeds or more. What one seed tells, its interval, Δ and p, says nothing of other seeds. No * is "
    "no proof of being as good. The best was chosen by the same scores, which favours it a little."
)


@dataclass(frozen=True)
class RankedLine:
    """A line of a group. behind: less the best, p after Holm; None for the best and where nothing is paired.

    seeds: those that it or the best has, of which `behind` may have paired fewer.
    """

    line: Line
    op: Interval | None
    behind: Difference | None = None
    seeds: int = 0

    @property
    def significant(self) -> bool:
        """Behind the best, and not by chance. The best by mean may be worse where both are paired."""
        d = self.behind
        return d is not None and d.seeds > 1 and d.mean < 0 and d.p < ALPHA


Tested = tuple[str, Strata]  # digest of the test examples, their scores at the end
Sample = dict[int, Tested]  # by seed


class Reader(Protocol):
    def __call__(self, reported: ReportedCell, task: str | None = None) -> Tested:
        """The test examples of one task, or of all as OP weighs them, and the cell's scores on them at the end.

        No scores where they are not on disk, or do not come to those that the cell recorded.
        """


def ranked_lines(
    members: Sequence[ReportedCell], tested: Callable[[ReportedCell], Tested]
) -> list[RankedLine]:
    """The lines of one group, the best OP first, incomplete ones last. tested: a `reader`."""
    lines = lines_of([member.cell for member in members])
    placed = {(f.cell["label"], f.cell["seed"]): f for f in members}
    samples: dict[str, Sample] = {}
    for line in lines:
        of_line = [placed[c["label"], c["seed"]] for c in line.cells if line.complete]
        samples[line.name] = {f.cell["seed"]: tested(f) for f in of_line}
    known = [RankedLine(line, op_interval(line, samples[line.name])) for line in lines]
    known.sort(key=lambda s: (not s.line.complete, s.op is None, -s.op.mean if s.op else 0.0))
    if not known or known[0].op is None:
        return known
    best = samples[known[0].line.name]
    behind = [None, *(difference(samples[s.line.name], best) for s in known[1:])]
    adjusted = holm([math.nan if d is None else d.p for d in behind])
    return [
        replace(s, behind=d and replace(d, p=p), seeds=len(samples[s.line.name].keys() | best))
        for s, d, p in zip(known, behind, adjusted, strict=True)
    ]


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
        "Strategy",
        "Task IDs",
        "OP",
        "OP low",
        "OP high",
        "Δ",
        "Δ low",
        "Δ high",
        "p (Holm)",
    )
    columns += ("p < 0.05", "Seeds", "Seeds compared", "Examples compared")
    exact = tuple(_row(s, ".4f", "{:.6g}".format) for s in ranked)
    return Table(
        f"Intervals: {title}", columns, tuple(map(_row, ranked)), f"{NOTE} {PROTOCOLS}", exact
    )


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

    scored: dict[Path, dict[str, Strata]] = {}

    def tested(reported: ReportedCell, task: str | None = None) -> Tested:
        out, data = reported.path.parent, reported.cell.get("data", "")
        if reported.path not in scored:
            scored[reported.path] = final(reported.path, reported.cell, asked(out, data))
        scores = scored[reported.path]
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
    """Interval of a score, one value a seed: over seeds, or over the test examples of a single one.

    known: mean and standard error, which serve where there are no such examples. None where a seed is unmeasured.
    """
    measured = [v for v in values if v is not None]
    if not measured or len(measured) < len(values):
        return None
    if len(measured) > 1:
        return over_seeds(measured)
    strata = [scores for _, scores in sample.values() if scores]
    return over_examples(strata[0]) if strata else over_normal(*known)


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _row(
    ranked: RankedLine, spec: str = ".1f", p: Callable[[float], str] = probability
) -> tuple[str, ...]:
    op, behind = ranked.op, ranked.behind
    shown = [UNMEASURED] * 3
    if op:
        shown = [show(100 * x, spec) for x in (op.mean, op.low, op.high)]
    told = [UNMEASURED] * 4
    if behind:
        told = [show(100 * x, f"+{spec}") for x in (behind.mean, behind.low, behind.high)]
        told.append(p(behind.p))
    counts = [str(behind.seeds), f"{behind.examples:,}"] if behind else [UNMEASURED] * 2
    seeds = str(len(ranked.line.cells)) if ranked.line.complete else UNMEASURED
    line = (ranked.line.name, ranked.line.protocol)
    return (*line, *shown, *told, "*" if ranked.significant else "", seeds, *counts)
