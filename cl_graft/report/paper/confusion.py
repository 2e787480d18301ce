"""What prompts were taken for where tasks are inferred, a grid for each router that chose differently."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from cl_graft.matrix import FloatArray
from cl_graft.report.paper.chosen import panels, short_names
from cl_graft.report.paper.sheet import SMALL, TYPE, WIDTHS, Drawn, grid, styled
from cl_graft.report.protocols import Cell
from cl_graft.report.routing import Confusion, confusions, routed
from cl_graft.report.style import shortened, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST = 4  # grids
CAPTION = (
    "What test prompts were taken for at the end, per cent of a row. Rows: the task that they are of; columns: what "
    "the router said. Frame: right. All seeds together."
)


@styled
def confusion(cells: Sequence[Cell], width: str, wanted: Collection[str] = ()) -> Drawn | None:
    """The grids of those with a router, the best OP first and one for all whose prompts were taken alike; None where no
    task was inferred."""
    from matplotlib.figure import Figure

    order = [line.name for panel in panels(cells, wanted) for line in (*panel.named, *panel.rest)]
    found = {c.name: c for c in confusions([s for s in routed(cells) if s.complete])}
    alike = _alike([found[name] for name in order if name in found])
    if not alike:
        return None
    short, shown = short_names(found), alike[:MOST]
    first = shown[0][0]
    rows, columns = len(first.of), len(first.taken_for)
    room = (WIDTHS[width] - 0.7) / (0.22 * columns)  # grids that have it for their numbers
    across = max(1, min(len(shown), int(room), 2 if width == "1col" else MOST))
    down = math.ceil(len(shown) / across)
    longest = max(map(len, shortened(first.taken_for)))
    turned = 0.05 * longest > (WIDTHS[width] - 0.7) / (across * columns)
    high = 0.16 * rows + 0.3 + (0.05 * longest if turned else 0.1)
    figure = Figure(figsize=(WIDTHS[width], down * high + 0.12), layout="constrained")
    places = list(figure.subplots(down, across, squeeze=False, sharey=True).flat)
    for ax in places[len(shown) :]:
        ax.remove()
    for ax, those in zip(places, shown, strict=False):
        names = short[those[0].name] + (f" and {len(those) - 1} more" if len(those) > 1 else "")
        _draw(ax, those[0], wrap(names, 26), turned)
    for ax in places[::across]:
        ax.set_ylabel("prompts of")
    figure.supxlabel("taken for", fontsize=TYPE)
    told = f" {len(alike) - MOST} further grids are left out." if len(alike) > MOST else ""
    same = "; ".join(
        f"{short[those[0].name]}: {', '.join(short[c.name] for c in those[1:])}"
        for those in shown
        if len(those) > 1
    )
    return Drawn(figure, CAPTION + (f" Taken alike: {same}." if same else "") + told)


def _alike(found: Sequence[Confusion]) -> list[list[Confusion]]:
    """Grids with the same counts together, in order of first appearance."""
    together: dict[bytes, list[Confusion]] = {}
    for one in found:
        together.setdefault(one.counts.tobytes(), []).append(one)
    return list(together.values())


def _draw(ax: Axes, one: Confusion, name: str, turned: bool) -> None:
    tasks = range(min(len(one.of), len(one.taken_for)))
    right = {(k, k) for k in tasks if one.of[k] == one.taken_for[k]}
    shares: FloatArray = 100.0 * one.shares
    texts = [["" if math.isnan(x) else f"{x:.0f}" for x in row] for row in shares]
    grid(ax, shares, texts, right)
    ax.set_yticks(np.arange(len(one.of)) + 0.5, shortened(one.of))
    names = shortened(one.taken_for)
    ax.set_xticks(np.arange(len(names)) + 0.5, names, rotation=90 if turned else 0)
    ax.tick_params(length=0, labelsize=SMALL, pad=2)
    ax.set_title(name)
