"""Rows of the page's tables, as plain values for its template."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cl_graft.report import ReportedCell
from cl_graft.report.aggregate import Line, number
from cl_graft.report.protocols import PARTS, held, part, protocol
from cl_graft.report.significance import RankedLine, probability
from cl_graft.report.statistics import Difference, Interval
from cl_graft.report.table import UNMEASURED, show
from cl_graft.report.tables import experiences_done

WIDTH = 132  # pixels of an interval's plot
LEAST = 0.05  # of the scores that it spans, or it would magnify what is all but alike


@dataclass(frozen=True)
class Datum:
    """A cell of a table: its text, what it sorts by, small print beneath, and a tint from -1 (lost) to 1 (gained)."""

    text: str
    value: float | None = None
    small: str = ""
    tint: float = 0.0


def ranking(ranked: Sequence[RankedLine]) -> list[dict[str, Any]]:
    """A row for each line of a group, part by part, the best of each first."""
    rows = []
    for s, plot in zip(ranked, _plots(ranked), strict=True):
        line, op, behind = s.line, s.op, s.behind
        ends = zip(line.mean[-1], line.stderr[-1], strict=True)
        rows.append(
            _who(line)
            | {
                "plot": plot,
                "mark": "best" if s.best else "behind" if s.significant else "",
                "over": op.over if op else "",
                "errors": line.errors,
                "op": _interval(op),
                "behind": _interval(behind, "+.1f"),
                "p": _p(s),
                "tasks": [_per_cent(mean, stderr) for mean, stderr in ends],
                "bwt": _per_cent(*line.metric("bwt"), spec="+.1f"),
                "fm": _per_cent(*line.metric("fm")),
                "general": _general(line),
                "routing": _per_cent(*line.routing()[-1]),
                "storage": _number(line.storage(), ".2f"),
                "bytes": list(map(_number, line.kept_bytes())),
                "seeds": len(line.cells) if line.complete else 0,
            }
        )
    return rows


def by_part(made: Iterable[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The rows of each part of a table, under its name where there are several."""
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in made:
        parts.setdefault(row["part"], []).append(row)
    several = len(parts) > 1
    return [(name if several else "", parts[name]) for name in PARTS if name in parts]


def _general(line: Line) -> Datum:
    """The change of general ability, and in small print what of."""
    change = _per_cent(*line.drift(), spec="+.1f")
    return replace(change, small=" ".join(filter(None, (change.small, line.ability))))


def by_task(ranked: RankedLine) -> dict[str, Any]:
    """Scores of each task: before any learning, once learned, at the end, and what was lost since it was learned."""
    parts = []
    for *scores, change in ranked.line.by_task():
        tint = 0.0 if math.isnan(change) else round(max(-1.0, min(1.0, change)), 3)
        lost = Datum(show(100 * change, "+.1f"), _value(change), tint=tint)
        parts.append((*map(_per_cent, scores), lost))
    return _named(ranked, parts)


def costs(ranked: RankedLine) -> dict[str, Any]:
    """Seconds by what they went into and in all, tokens, memory, bytes alive and of the largest pack."""
    seconds, rest = ranked.line.costs()
    parts = [*(_number(x, ",.1f") for x in seconds), *map(_number, rest)]
    return _named(ranked, [*parts, *map(_number, ranked.line.kept_bytes())])


def routing(ranked: RankedLine) -> dict[str, Any]:
    """How often prompts were taken for the task they are of, after each task."""
    return _named(ranked, [_per_cent(*estimate) for estimate in ranked.line.routing()])


def _named(ranked: RankedLine, parts: list[Any]) -> dict[str, Any]:
    line = ranked.line
    return _who(line) | {"parts": parts}


def _who(line: Line) -> dict[str, Any]:
    who = dict(zip(("name", "protocol", "budget"), line.who, strict=True))
    return who | {"complete": line.complete, "part": line.part}


def cell(reported: ReportedCell, page: str) -> dict[str, Any]:
    """The row of a cell in the list of all. page: the address of its own."""
    told = reported.cell
    done = experiences_done(told)
    return {
        "page": page,
        "cell": told,
        "protocol": protocol(told),
        "budget": held(told),
        "part": part(told),
        "op": _per_cent(number(told["metrics"].get("op"))),
        "bwt": _per_cent(number(told["metrics"].get("bwt")), spec="+.1f"),
        "experiences": Datum(f"{done} of {len(told['matrix'])}", done),
        "seconds": _number(told.get("spent"), ",.1f"),
    }


def _plots(ranked: Sequence[RankedLine]) -> list[list[float]]:
    """Where each interval begins, its mean, its end, and the mean of its part's first, in pixels of one scale; none
    where there is no interval.

    Nothing is drawn beyond scores of 0 and 1: the t interval of two seeds would leave the others no room.
    """
    clipped = [[min(max(x, 0.0), 1.0) for x in _ends(s.op)] if s.op else [] for s in ranked]
    ends = [x for those in clipped for x in those]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    first: dict[str, list[float]] = {}
    for s, those in zip(ranked, clipped, strict=True):
        first.setdefault(s.line.part, those[1:2])

    def place(x: float) -> float:
        return round(5 + (WIDTH - 10) * (x - low) / max(high - low, LEAST), 1)

    return [
        [place(x) for x in those + first[s.line.part]] if those else []
        for s, those in zip(ranked, clipped, strict=True)
    ]


def _ends(interval: Interval) -> list[float]:
    ends = (interval.low, interval.mean, interval.high)
    return [interval.mean if math.isnan(x) else x for x in ends]


def _p(ranked: RankedLine) -> Datum:
    """The probability, with the seeds that were paired, where those are not all."""
    d = ranked.behind
    if d is None:
        return Datum(UNMEASURED)
    some = f"{d.seeds} of {ranked.seeds} seeds" if d.seeds < ranked.seeds else ""
    return Datum(probability(d.p) + ("\u2009*" if ranked.significant else ""), d.p, some)


def _interval(known: Interval | Difference | None, spec: str = ".1f") -> Datum:
    if known is None:
        return Datum(UNMEASURED)
    told = ""
    if not math.isnan(known.low):
        told = f"[{show(100 * known.low, spec)}, {show(100 * known.high, spec)}]"
    return Datum(show(100 * known.mean, spec), known.mean, told)


def _per_cent(mean: float, stderr: float = math.nan, spec: str = ".1f") -> Datum:
    small = "" if math.isnan(mean) or math.isnan(stderr) else f"± {show(100 * stderr, '.1f')}"
    return Datum(show(100 * mean, spec), _value(mean), small)


def _number(value: float | None, spec: str = ",.0f") -> Datum:
    return Datum(show(number(value), spec), _value(number(value)))


def _value(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
