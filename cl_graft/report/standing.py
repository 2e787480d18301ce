"""Who stands where in a group: intervals over seeds, and each label against the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ..prompts import Asked, recall
from . import Found
from .examples import final
from .series import Series, series
from .statistics import (
    Difference,
    Interval,
    Strata,
    holm,
    over_examples,
    over_normal,
    over_seeds,
    paired,
)
from .table import UNMEASURED, Table, show

ALPHA = 0.05
NOTE = (
    "OP in per cent with its 95 % interval: Student's t over seeds; for one seed a bootstrap over test examples, which "
    "says nothing of other seeds. Δ: less the best, with the 95 % interval and two-sided p of a paired hierarchical "
    "bootstrap (seeds, then test examples), p after Holm within the group; * below 0.05. The best was chosen by the "
    "same scores, which favours it a little."
)


@dataclass(frozen=True)
class Standing:
    """A line of a group. behind: less the best, p after Holm; None for the best and where nothing is paired."""

    line: Series
    op: Interval | None
    behind: Difference | None = None

    @property
    def significant(self) -> bool:
        return self.behind is not None and self.behind.p < ALPHA


Sample = dict[int, tuple[str, Strata]]  # seed -> fingerprint of the data, scores at the end


def standings(members: Sequence[Found], examples: Callable[[Found], Strata]) -> list[Standing]:
    """The lines of one group, the best OP first, incomplete ones last."""
    lines = series([found.cell for found in members])
    placed = {(f.cell["label"], f.cell["seed"]): f for f in members}
    samples = {}
    for line in lines:
        founds = [placed[c["label"], c["seed"]] for c in line.cells if line.complete]
        samples[line.name] = {f.cell["seed"]: (f.cell.get("data", ""), examples(f)) for f in founds}
    known = [Standing(line, _interval(line, samples[line.name])) for line in lines]
    known.sort(key=lambda s: (not s.line.complete, s.op is None, -s.op.mean if s.op else 0.0))
    if not known or known[0].op is None:
        return known
    best = samples[known[0].line.name]
    found = [None, *(difference(samples[s.line.name], best) for s in known[1:])]
    adjusted = holm([math.nan if d is None else d.p for d in found])
    return [
        replace(s, behind=d and replace(d, p=p))
        for s, d, p in zip(known, found, adjusted, strict=True)
    ]


def difference(one: Sample, other: Sample) -> Difference | None:
    """One minus the other over the seeds that both ran on the same data; None where there is none."""
    pairs, data = [], set()
    for seed in sorted(one.keys() & other.keys()):
        (mine, a), (theirs, b) = one[seed], other[seed]
        if mine == theirs and a and [(w, x.size) for w, x in a] == [(w, x.size) for w, x in b]:
            pairs.append([(w, x - y) for (w, x), (_, y) in zip(a, b, strict=True)])
            data.add(mine)
    if not pairs:
        return None
    sizes = {tuple(x.size for _, x in strata) for strata in pairs}
    return paired(pairs, shared=len(data) == 1 and len(sizes) == 1 and len(pairs) > 1)


def table(title: str, found: Sequence[Standing]) -> Table:
    """OP with its interval, and the difference to the best with its interval and p."""
    columns: tuple[str, ...] = (
        "Strategy",
        "OP",
        "OP low",
        "OP high",
        "Δ",
        "Δ low",
        "Δ high",
        "p (Holm)",
    )
    columns += ("p < 0.05", "Seeds", "Seeds compared", "Examples compared")
    return Table(f"Intervals: {title}", columns, tuple(map(_row, found)), NOTE)


def reader() -> Callable[[Found], Strata]:
    """Scores of a cell at its end; what was asked is read once for all cells of the same data."""

    @cache
    def asked(out: Path, data: str) -> dict[str, list[Asked]]:
        return recall(out, data)

    return lambda found: final(
        found.path, found.cell, asked(found.path.parent, found.cell.get("data", ""))
    )


def _interval(line: Series, sample: Sample) -> Interval | None:
    values = [cell["metrics"].get("op") for cell in line.cells]
    if not line.complete or any(v is None for v in values):
        return None
    if len(values) > 1:
        return over_seeds(values)
    ((_, strata),) = sample.values()
    return over_examples(strata) if strata else over_normal(*line.metric("op"))


def _row(found: Standing) -> tuple[str, ...]:
    op, behind = found.op, found.behind
    shown = [UNMEASURED] * 3
    if op:
        shown = [show(100 * x, ".1f") for x in (op.mean, op.low, op.high)]
    told = [UNMEASURED] * 4
    if behind:
        told = [show(100 * x, "+.1f") for x in (behind.mean, behind.low, behind.high)]
        told.append(probability(behind.p))
    counts = [str(behind.seeds), f"{behind.examples:,}"] if behind else [UNMEASURED] * 2
    seeds = str(len(found.line.cells)) if found.line.complete else UNMEASURED
    return (found.line.name, *shown, *told, "*" if found.significant else "", seeds, *counts)


def probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
