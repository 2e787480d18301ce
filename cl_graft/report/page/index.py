"""The page of a report: what is on it, as plain values for its template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cl_graft.report import ReportedCell
from cl_graft.report.aggregate import ABILITIES, ERRORS, KINDS, base_note, scored_by
from cl_graft.report.divergence import measured
from cl_graft.report.divergence import table as kl_to_base
from cl_graft.report.figures import figures_of
from cl_graft.report.page import rows
from cl_graft.report.page.template import render as fill
from cl_graft.report.protocols import PROTOCOLS, Cell
from cl_graft.report.provenance import commands
from cl_graft.report.quoted import quoted
from cl_graft.report.routing import ACCURACY_NOTE, confusion_tables, inferred
from cl_graft.report.significance import NOTE, RankedLine
from cl_graft.report.statistics import Interval
from cl_graft.report.style import DARK, MARKERS, looks_of
from cl_graft.report.table import Table
from cl_graft.report.tables import BYTES_NOTE, matrices, metrics
from cl_graft.report.unlearning import unlearning

CAPTIONS = {
    "heatmaps": "Forgetting matrices, all on one colour scale. Rows are experiences, columns tasks.",
    "curves": "The score of each task along the stream.",
    "bytes-vs-score": "Final score against the bytes alive after the last task, with the Pareto front.",
    "bytes-vs-forgetting": "Forgetting against the bytes alive after the last task; less is better.",
    "kl-vs-forgetting": "What was lost against how far the model moved from the base on the text that it learned.",
    "costs": "What a cell took, by what it went into, and its peak memory; means over seeds.",
    "routing": "What test prompts were taken for at the end. Rows: their own task. Columns: what a router said.",
}
SIGNS = dict(zip(MARKERS, "●■▲◆▼✚✖⬟⬢", strict=True))  # a marker of the figures as a letter
MANY = 12  # tasks from which on the ranking leaves out their columns; the breakdown has them


def render(
    members: Mapping[str, Sequence[ReportedCell]],
    titles: Sequence[str],
    known: Mapping[str, Sequence[RankedLine]],
    budgets: Sequence[tuple[str, str]],
    overview: Table,
    orders: Mapping[str, Table],
    bases: Mapping[str, Interval | None],
    pages: Mapping[Path, str],
) -> str:
    """The page. titles: of the groups. budgets: slug and title of each figure over budgets. orders: tables, by slug.
    bases: by slug, the base model's mean score. pages: of the cells, by their folders."""
    links = {path: quote(page) for path, page in pages.items()}
    reported = [f for those in members.values() for f in those]
    return fill(
        "index.html",
        groups=[
            _group(slug, title, known[slug], those, bases[slug], links)
            for (slug, those), title in zip(members.items(), titles, strict=True)
        ],
        cells=rows.by_part(rows.cell(f, links[f.path]) for f in reported),
        counts={
            "cells": len(reported),
            "incomplete": sum(not f.cell["complete"] for f in reported),
            "strategies": len({f.cell["label"] for f in reported}),
            "scenarios": len({f.cell["scenario"] for f in reported}),
            "models": len({f.cell["model"] for f in reported}),
            "seeds": len({f.cell["seed"] for f in reported}),
        },
        budgets=budgets,
        overview=overview,
        orders=orders,
        versions=_distinct(reported, "versions"),
        machines=_distinct(reported, "machine"),
        captions=CAPTIONS,
        note=NOTE,
        errors=ERRORS,
        protocols=PROTOCOLS,
        bytes=BYTES_NOTE,
        abilities=ABILITIES,
        routing=ACCURACY_NOTE,
    )


def _leaders(ranked: Sequence[RankedLine]) -> list[dict[str, Any]]:
    """The best of each part, all of those that share the place, with the interval of the first."""
    leaders: dict[str, list[RankedLine]] = {}
    for s in ranked:
        if s.best:
            leaders.setdefault(s.line.part, []).append(s)
    return [
        {"part": part, "names": ", ".join(s.line.name for s in those), "op": those[0].op}
        for part, those in leaders.items()
    ]


def _group(
    slug: str,
    title: str,
    ranked: Sequence[RankedLine],
    members: Sequence[ReportedCell],
    base: Interval | None,
    pages: Mapping[Path, str],
) -> dict[str, Any]:
    """base: the mean score of the base model."""
    cells = [f.cell for f in members]
    links = {id(f.cell): pages[f.path] for f in members}
    lines = [s.line for s in ranked]
    looks = looks_of(lines)
    colours = {
        name: (
            look["color"],
            DARK.get(look["color"].lower(), look["color"]),
            SIGNS[look["marker"]],
        )
        for name, look in looks.items()
    }
    first = cells[0]
    return {
        "slug": slug,
        "scored": scored_by(cells),
        "title": title,
        "first": first,
        "tasks": first["tasks"],
        "seeds": len({c["seed"] for c in cells}),
        "cells": len(cells),
        "strategies": len({c["label"] for c in cells}),
        "best": _leaders(ranked),
        "base": base,
        "base_note": base_note(cells),
        "colours": colours,
        "rows": rows.by_part(rows.ranking(ranked)),
        "wide": len(first["tasks"]) <= MANY,
        "breakdown": rows.by_part(map(rows.by_task, ranked)),
        "costs": rows.by_part(map(rows.costs, ranked)),
        "routed": rows.by_part(rows.routing(s) for s in ranked if any(map(inferred, s.line.cells))),
        "numbers": [
            *unlearning(cells),
            *metrics(cells),
            *kl_to_base(cells),
            *matrices(cells),
            *confusion_tables(cells),
            *quoted(cells),
        ],
        "moved": any(map(measured, cells)),
        "pages": {
            s.line.name: [(c["seed"], links[id(c)], _examples(c)) for c in s.line.cells]
            for s in ranked
        },
        "figures": [(name, f"{slug}-{name}") for name in figures_of(cells)],
        "commands": commands(cells),
        "kinds": KINDS,
    }


def _examples(cell: Cell) -> str:
    """How many test examples its page shows the answers to, as far as the cell says."""
    count = sum(n or 0 for n in (cell["n"] or [[]])[0])
    return f"{count:,} examples" if count else "examples"


def _distinct(reported: Sequence[ReportedCell], key: str) -> list[tuple[dict[str, str], int]]:
    """Each different value with the number of cells that have it, the most common first."""
    counts = Counter(json.dumps(f.cell[key], sort_keys=True) for f in reported)
    return [(json.loads(text), count) for text, count in counts.most_common()]
