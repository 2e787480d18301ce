"""What the pages of cells are called: by what tells a cell from the others that are reported with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from cl_graft.report import ReportedCell
from cl_graft.report.protocols import Cell

LONGEST = 150  # characters of a file's name, of which a disk holds some more


def pages(reported: Sequence[ReportedCell]) -> dict[Path, str]:
    """{folder of a cell: its page, relative to the report}.

    A name has the strategy, and of its options, scenario, model, budget and seed what is not the same for all cells;
    and the order of tasks, where nothing else tells two cells apart.
    """
    parts = [_parts(f.cell) for f in reported]
    for k in (0, 1):  # options that all have tell nothing
        shorter = _without_common([own[k] for own in parts])
        parts = [(*own[:k], name, *own[k + 1 :]) for own, name in zip(parts, shorter, strict=True)]
    differ = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    if differ:
        differ[1], differ[-1] = True, len({own[:-1] for own in parts}) < len(parts)
    taken: set[str] = set()
    named = {}
    for f, own in zip(reported, parts, strict=True):
        told = [part for part, kept in zip(own, differ, strict=True) if kept]
        stem = "_".join(re.sub(r"[^A-Za-z0-9.]+", "-", part).strip("-.") for part in told)[:LONGEST]
        names = (f"{stem}-{k}" if k else stem for k in range(len(reported) + 1))
        name = next(name for name in names if name.lower() not in taken)  # some disks fold case
        taken.add(name.lower())
        named[f.path] = f"cells/{name}.html"
    return named


def _without_common(labels: Sequence[str]) -> list[str]:
    """The labels without the options that all of them have."""
    split = [label.removesuffix(")").partition("(") for label in labels]
    options = [told.split(", ") if told else [] for _, _, told in split]
    common = set.intersection(*map(set, options)) if options else set()
    left = [[option for option in own if option not in common] for own in options]
    return ["-".join([name, *own]) for (name, _, _), own in zip(split, left, strict=True)]


def _parts(cell: Cell) -> tuple[str, ...]:
    model, budget = str(cell["model"]), str(cell["budget"]).replace("%", "pct")
    order = "-".join(cell["tasks"])
    return cell["scenario"], cell["label"], Path(model).name, budget, f"seed{cell['seed']}", order
