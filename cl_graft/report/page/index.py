"""The page of a report: what is on it, as plain values for its template."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from .. import Found
from ..figures import FIGURES
from ..provenance import commands
from ..series import general, number, packs
from ..standing import NOTE, Standing, probability
from ..statistics import Difference, Interval
from ..style import DARK, looks_of
from ..table import UNMEASURED, show
from ..tables import KINDS, matrices
from .cell import file
from .template import render as fill

CAPTIONS = {
    "heatmaps": "Forgetting matrices, all on one colour scale. Rows are stages, columns tasks.",
    "curves": "The score of each task along the stream.",
    "bytes-vs-score": "Final score against the bytes of the largest pack, with the Pareto front.",
    "bytes-vs-forgetting": "Forgetting against the bytes of the largest pack; less is better.",
    "costs": "What a cell took, by what it went into, and its peak memory; means over seeds.",
}
WIDTH = 132  # pixels of an interval's plot
MANY = 12  # tasks from which on the ranking leaves out their columns; the breakdown has them


@dataclass(frozen=True)
class Datum:
    """A cell of a table: its text, what it sorts by, small print beneath, and a tint from -1 (lost) to 1 (gained)."""

    text: str
    value: float | None = None
    small: str = ""
    tint: float = 0.0


def render(
    members: Mapping[str, Sequence[Found]],
    titles: Sequence[str],
    known: Mapping[str, Sequence[Standing]],
    budgets: Sequence[tuple[str, str]],
) -> str:
    """The page. titles: of the groups. budgets: slug and title of each figure over budgets."""
    found = [f for those in members.values() for f in those]
    return fill(
        "index.html",
        groups=[
            _group(slug, title, known[slug], those)
            for (slug, those), title in zip(members.items(), titles, strict=True)
        ],
        cells=[_cell(f) for f in found],
        counts={
            "cells": len(found),
            "incomplete": sum(not f.cell["complete"] for f in found),
            "strategies": len({f.cell["label"] for f in found}),
            "scenarios": len({f.cell["scenario"] for f in found}),
            "models": len({f.cell["model"] for f in found}),
            "seeds": len({f.cell["seed"] for f in found}),
        },
        budgets=budgets,
        versions=_distinct(found, "versions"),
        machines=_distinct(found, "machine"),
        captions=CAPTIONS,
        note=NOTE,
    )


def _group(
    slug: str, title: str, found: Sequence[Standing], members: Sequence[Found]
) -> dict[str, Any]:
    cells = [f.cell for f in members]
    links = {id(f.cell): _link(f) for f in members}
    lines = [s.line for s in found]
    looks = looks_of(lines)
    colours = {
        name: (look["color"], DARK.get(look["color"].lower(), look["color"]))
        for name, look in looks.items()
    }
    best = found[0] if found and found[0].op else None
    first = cells[0]
    base = [number(x) for c in cells for x in c["matrix"][0]]
    return {
        "slug": slug,
        "title": title,
        "first": first,
        "tasks": first["tasks"],
        "seeds": len({c["seed"] for c in cells}),
        "cells": len(cells),
        "best": best,
        "tied": [s.line.name for s in found[1:] if s.behind and not s.significant] if best else [],
        "compared": any(s.behind for s in found),
        "base": math.fsum(base) / len(base) if base else math.nan,
        "colours": colours,
        "rows": _ranking(found),
        "wide": len(first["tasks"]) <= MANY,
        "breakdown": [_by_task(s) for s in found],
        "costs": [_costs(s) for s in found],
        "matrices": matrices(cells),
        "pages": {s.line.name: [(c["seed"], links[id(c)]) for c in s.line.cells] for s in found},
        "figures": [(name, f"{slug}-{name}") for name in FIGURES],
        "commands": commands(cells),
        "kinds": KINDS,
    }


def _link(found: Found) -> str:
    return quote(file(found, Path()).as_posix())


def _ranking(found: Sequence[Standing]) -> list[dict[str, Any]]:
    ends = [x for s in found if s.op for x in (s.op.low, s.op.mean, s.op.high) if not math.isnan(x)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    best = found[0].op.mean if found and found[0].op else math.nan

    def place(x: float) -> float:
        return round(5 + (WIDTH - 10) * (x - low) / ((high - low) or 1.0), 1)

    rows = []
    for rank, s in enumerate(found, 1):
        line, op, behind = s.line, s.op, s.behind
        ends = [] if op is None else [op.low, op.mean, op.high, best]
        drift = line.over_seeds(lambda c: general(c)[-1] - general(c)[0])
        total = line.over_seeds(lambda c: sum(packs(c)) if packs(c) else math.nan)[0]
        mark = (
            "best" if rank == 1 and op else "behind" if s.significant else "tied" if behind else ""
        )
        rows.append(
            {
                "rank": rank if op else None,
                "name": line.name,
                "complete": line.complete,
                "plot": [place(op.mean if op and math.isnan(x) else x) for x in ends],
                "mark": mark,
                "op": _interval(op),
                "behind": _interval(behind, "+.1f"),
                "p": Datum(probability(behind.p), behind.p) if behind else Datum(UNMEASURED),
                "tasks": [
                    _per_cent(m, e) for m, e in zip(line.mean[-1], line.stderr[-1], strict=True)
                ],
                "bwt": _per_cent(*line.metric("bwt"), spec="+.1f"),
                "fm": _per_cent(*line.metric("fm")),
                "general": _per_cent(*drift, spec="+.1f"),
                "storage": _number(line.storage(), ".2f"),
                "bytes": _number(total),
                "seeds": len(line.cells) if line.complete else 0,
            }
        )
    return rows


def _by_task(found: Standing) -> dict[str, Any]:
    """Of each task: before any learning, once learned, at the end, and what was lost since it was learned."""
    line, parts = found.line, []
    for j, end in enumerate(line.mean[-1]):
        learned = float(line.mean[j + 1, j])
        change = float(end) - learned
        tint = 0.0 if math.isnan(change) else max(-1.0, min(1.0, change))
        parts.append(
            (
                _per_cent(float(line.mean[0, j])),
                _per_cent(learned),
                _per_cent(float(end)),
                Datum(show(100 * change, "+.1f"), _value(change), tint=round(tint, 3)),
            )
        )
    return {"name": line.name, "complete": line.complete, "parts": parts}


def _costs(found: Standing) -> dict[str, Any]:
    line = found.line
    seconds = [line.over_seeds(lambda c: number(c["seconds"].get(k)))[0] for k in KINDS]  # noqa: B023
    rest = [line.over_seeds(lambda c: number(c.get(k)))[0] for k in ("tokens", "peak_memory_mb")]  # noqa: B023
    shown = [_number(x, ",.1f") for x in [*seconds, math.fsum(seconds)]]
    return {
        "name": line.name,
        "complete": line.complete,
        "parts": shown + [_number(x) for x in rest],
    }


def _cell(found: Found) -> dict[str, Any]:
    cell = found.cell
    done = sum(any(x is not None for x in row) for row in cell["matrix"])
    return {
        "page": _link(found),
        "name": found.path.name,
        "cell": cell,
        "op": _per_cent(number(cell["metrics"].get("op"))),
        "bwt": _per_cent(number(cell["metrics"].get("bwt")), spec="+.1f"),
        "stages": Datum(f"{done} of {len(cell['tasks']) + 1}", done),
        "seconds": _number(cell.get("spent"), ",.1f"),
    }


def _distinct(found: Sequence[Found], key: str) -> list[tuple[dict[str, str], int]]:
    """Each different value with the number of cells that have it, the most common first."""
    counts = Counter(json.dumps(f.cell[key], sort_keys=True) for f in found)
    return [(json.loads(text), count) for text, count in counts.most_common()]


def _interval(found: Interval | Difference | None, spec: str = ".1f") -> Datum:
    if found is None:
        return Datum(UNMEASURED)
    told = ""
    if not math.isnan(found.low):
        told = f"[{show(100 * found.low, spec)}, {show(100 * found.high, spec)}]"
    return Datum(show(100 * found.mean, spec), found.mean, told)


def _per_cent(mean: float, stderr: float = math.nan, spec: str = ".1f") -> Datum:
    small = "" if math.isnan(mean) or math.isnan(stderr) else f"± {show(100 * stderr, '.1f')}"
    return Datum(show(100 * mean, spec), _value(mean), small)


def _number(value: float | None, spec: str = ",.0f") -> Datum:
    return Datum(show(number(value), spec), _value(number(value)))


def _value(value: float) -> float | None:
    return None if math.isnan(value) else round(float(value), 6)
