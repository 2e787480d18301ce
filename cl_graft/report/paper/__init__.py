"""Figures and tables for a paper, written when they are asked for: `cl-graft report FOLDER --paper`.

<folder>/overview-1col.pdf, ranks-...     all scenarios: a grid of scores, and a critical-difference plot
<folder>/scenarios-told.tex, ...          the same as tables
<folder>/<scenario>/curves-1col.pdf, ...  a scenario (with model, budget and order, where there are several)
<folder>/<scenario>/scores-told.tex, ...  its scores as tables

Who is named in a figure: `chosen.py`. How wide and in which type it is printed: `sheet.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from cl_graft.report import ReportedCell
from cl_graft.report.aggregate import groups, lines_of, slugged
from cl_graft.report.overview import Standing, names_of, standings_of
from cl_graft.report.page.work import Work
from cl_graft.report.paper import chosen, sheet, tables
from cl_graft.report.paper.confusion import confusion
from cl_graft.report.paper.critical import critical
from cl_graft.report.paper.curves import curves
from cl_graft.report.paper.drift import drift
from cl_graft.report.paper.plasticity import plasticity
from cl_graft.report.paper.standing import Scores, standing
from cl_graft.report.paper.storage import storage
from cl_graft.report.protocols import TOLD, UNTOLD, Cell, distinct
from cl_graft.report.ranks import ranked
from cl_graft.report.significance import Reader, ranked_lines, reader
from cl_graft.report.statistics import Interval
from cl_graft.report.table import write_atomic
from cl_graft.store.digests import digest

FIGURES: dict[str, Callable[..., sheet.Drawn | None]] = {  # of a scenario, model and budget
    "curves": curves,
    "plasticity": plasticity,
    "kl": drift,
    "routing": confusion,
}
COST = 3.0  # of a figure, beside one of the page's


def write(
    reported: Sequence[ReportedCell],
    folder: Path,
    tested: Reader | None = None,
    named: Sequence[str] = (),
) -> Path:
    """Everything above for the complete cells; returns the folder. Raises OSError where the disk refuses, UnknownName
    for what is none of their strategies.

    tested: a `reader` that may have read their test examples already. named: strategies or labels to name in figures,
    whatever their rank.
    """
    chosen.check((f.cell for f in reported), named)
    kept = {id(cell) for cell in distinct([f.cell for f in reported]) if cell["complete"]}
    found = [f for f in reported if id(f.cell) in kept]
    if not found:
        return folder
    examples, placed = tested or reader(), {id(f.cell): f for f in found}
    cells = [f.cell for f in found]
    making = Work(folder / "made.json")

    def add(stem: Path, of: Sequence[Any], draw: Callable[..., Any]) -> None:
        label = "-".join(stem.relative_to(folder).parts)
        call = partial(sheet.save, draw, stem, label)
        making.add(sheet.files_of(stem), digest(list(of), list(named), _code()), call, COST)

    titles = _titles(list(groups(cells).values()), budgets=True)
    for (slug, members), title in zip(slugged(titles), groups(cells), strict=True):
        for name, draw in FIGURES.items():
            add(folder / slug / name, members, partial(draw, members, wanted=named))
        lines = ranked_lines([placed[id(c)] for c in members], examples)
        for name, text in tables.scores(title, lines, slug).items():
            write_atomic(folder / slug / name, text.encode())
    for slug, members in slugged(_titles(_over_budgets(cells), budgets=False)):
        add(folder / slug / "bytes", members, partial(storage, members, wanted=named))
    ranks = {part: ranked(cells, part) for part in (UNTOLD, TOLD)}
    scores = _scores(found, examples, ranks)
    if len(titles) > 1:  # else its scores have it all
        for name, text in tables.overview(scores, "scenarios").items():
            write_atomic(folder / name, text.encode())
    add(folder / "overview", cells, partial(standing, scores, wanted=named))
    labels = sorted({cell["label"] for cell in cells})
    add(folder / "ranks", cells, partial(critical, ranks, names=labels))
    with making:
        pass
    making.keep()
    return folder


def _over_budgets(cells: Sequence[Cell]) -> list[list[Cell]]:
    """The cells of each scenario, order of tasks and model, at all budgets."""
    together: dict[tuple[Any, ...], list[Cell]] = {}
    for cell in cells:
        key = cell["scenario"], tuple(cell["tasks"]), cell["model"]
        together.setdefault(key, []).append(cell)
    return list(together.values())


def _titles(grouped: Sequence[list[Cell]], budgets: bool) -> dict[str, list[Cell]]:
    """The groups by what tells them apart: always the scenario, and of model, budget and order what differs."""
    parts = [
        (
            cells[0]["scenario"],
            Path(cells[0]["model"]).name,
            cells[0]["budget"] if budgets else "",
            "-".join(cells[0]["tasks"]),
        )
        for cells in grouped
    ]
    several = [True, *(len({own[k] for own in parts}) > 1 for k in (1, 2))]
    several.append(len({own[:3] for own in parts}) < len(parts))
    return {
        " ".join(
            part for part, differs in zip(own, several, strict=True) if differs and part
        ): cells
        for own, cells in zip(parts, grouped, strict=True)
    }


def _scores(found: Sequence[ReportedCell], examples: Reader, ranks: Any) -> Scores:
    """Scores by scenario, or by the tasks of the only one."""
    cells = [f.cell for f in found]
    names = names_of(cells)
    standings = standings_of(found, list(names), examples)
    if len(names) > 1 or len(groups(cells)) > 1:
        of = "Overall performance (OP, per cent; the mean over seeds and orders of tasks) by scenario."
        return Scores(of, tuple(names.values()), standings, ranks)
    lines = {(line.part, line.name): line for line in lines_of(cells)}
    base, tasks = next(iter(lines.values())).mean[0], tuple(cells[0]["tasks"])

    def by_task(s: Standing) -> Standing:
        ends = base if not s.part else lines[s.part, s.who[0]].mean[-1]
        known = [Interval(float(x), float("nan"), float("nan")) for x in ends]
        return Standing(s.part, s.who, [*known, *s.scores])

    of = f"Final scores (per cent, means over seeds) by task of {cells[0]['scenario']}, and their mean (OP)."
    return Scores(of, (*tasks, "OP"), [by_task(s) for s in standings], ranks)


@cache
def _code() -> str:
    """The code that draws, and the version of the library that it draws with."""
    files = sorted(
        (file.name, file.read_text("utf-8"))
        for folder in (resources.files("cl_graft.report"), resources.files(__package__))
        for file in folder.iterdir()
        if file.name.endswith(".py")
    )
    return digest(files, metadata.version("matplotlib"))
