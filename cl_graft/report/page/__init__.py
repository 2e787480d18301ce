"""The report as pages that open from the file system: one for everything, one for each cell.

<folder>/index.html         ranking, figures, breakdown by task, costs, versions, how to reproduce
<folder>/cells/<cell>.html  a cell: its matrix, config, versions, losses and every test example
<folder>/dark/<figure>.svg  the figures for a dark page
<folder>/made.json          of what each figure and cell's page was made: what has not changed is not made again
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cl_graft.report import ReportedCell, budgets
from cl_graft.report.aggregate import groups, slugged
from cl_graft.report.figures import draw, figures_of
from cl_graft.report.orders import over_orders
from cl_graft.report.overview import base_interval, overview
from cl_graft.report.page import cell, index, names, sources
from cl_graft.report.page.work import SMALL, Work
from cl_graft.report.significance import Reader, ranked_lines, reader, table
from cl_graft.report.style import files_of
from cl_graft.report.table import TEXTS, write_atomic
from cl_graft.store.digests import digest


def write(reported: Sequence[ReportedCell], folder: Path, tested: Reader | None = None) -> Path:
    """Everything above for these cells, and the figures; returns the index. Raises OSError where the disk refuses.

    tested: a `reader` that may have read their test examples already.
    """
    placed = {id(f.cell): f for f in reported}
    titled = groups([f.cell for f in reported])
    members = {slug: [placed[id(c)] for c in those] for slug, those in slugged(titled)}
    making = Work(folder / "made.json")
    for slug, those in members.items():
        cells = [f.cell for f in those]
        key = digest(cells, sources.of_figures())
        for name in figures_of(cells):
            stem = folder / f"{slug}-{name}"
            making.add(files_of(stem), key, partial(draw, name, cells, stem), 1.0)
    several = list(slugged(budgets.groups([f.cell for f in reported])))
    for slug, over in several:
        stem = folder / f"{slug}-budgets"
        key = digest(over, sources.of_figures())
        files = [*files_of(stem), *(stem.with_name(f"{stem.name}.{kind}") for kind in TEXTS)]
        making.add(files, key, partial(budgets.write, over, stem), 1.0)
    pages = names.pages([f for those in members.values() for f in those])
    for slug, those in members.items():
        for f in those:
            file = folder / pages[f.path]
            making.add([file], sources.of_cell(f, slug), partial(cell.write, f, file, slug), SMALL)
    making.made |= {f"cell {f.path.name}": pages.get(f.path, "") for f in reported}
    with making:
        examples = tested or reader()
        known = {slug: ranked_lines(those, examples) for slug, those in members.items()}
        over_all = overview(reported, examples)
        over_all.write(folder / "overview")
        bases = {slug: base_interval(those, examples) for slug, those in members.items()}
        for title, (slug, ranked) in zip(titled, known.items(), strict=True):
            table(title, ranked).write(folder / f"{slug}-intervals")
        shown = [
            (f"{slug}-budgets", f"{c[0]['scenario']} · {c[0]['model']}") for slug, c in several
        ]
        orders = dict(slugged(over_orders([f.cell for f in reported])))
        text = index.render(members, list(titled), known, shown, over_all, orders, bases, pages)
    written = write_atomic(folder / "index.html", text.encode())
    making.keep()
    for left in making.before.keys() - making.made.keys():
        if left.startswith(
            "cells/"
        ):  # pages that are called otherwise now, or are of cells that are gone
            (folder / left).unlink(missing_ok=True)
    return written
