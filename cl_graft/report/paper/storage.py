"""Score against bytes, at every budget that there is."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cl_graft.report.aggregate import Line
from cl_graft.report.paper.chosen import Looks, Panel, looks, panels, short_names, told
from cl_graft.report.paper.sheet import REST, SMALL, Drawn, axes, key, legend, styled
from cl_graft.report.protocols import Cell
from cl_graft.report.style import GREY, roomy
from cl_graft.report.tradeoff import log_ticks, near, pareto

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Point = tuple[float, float, float]  # storage and OP in per cent, standard error of OP
CAPTION = (
    "Score against bytes: overall performance (OP) and the bytes alive after the last task, a task, in per cent of the "
    "base model in bf16. Dotted: budgets. Stairs: the Pareto front. Whiskers: one standard error over seeds, or over "
    "the test examples of one."
)


@styled
def storage(cells: Sequence[Cell], width: str, wanted: Collection[str] = ()) -> Drawn | None:
    """A point a strategy and budget, those of a strategy joined, a panel for each protocol; None where nothing has
    bytes. cells: of one scenario, order of tasks and model, at any budgets."""
    budgets = sorted({(c["budget_bytes"], c["budget"]) for c in cells}, reverse=True)
    by_budget = [panels([c for c in cells if c["budget"] == name], wanted) for _, name in budgets]
    chosen = by_budget[0]  # who is named at the largest budget
    found = {panel.part: _points(panel.part, by_budget) for panel in chosen}
    shown = [panel for panel in chosen if any(found[panel.part].values())]
    if not shown:
        return None
    every = [line for panel in shown for line in panel.lines]
    short = short_names({line.name for line in every} | {n for f in found.values() for n in f})
    seen = looks(shown, short)
    figure, places = axes(width, len(shown), 2.1)
    for ax, panel in zip(places, shown, strict=True):
        _draw(ax, panel, found[panel.part], short, seen)
        for size, name in budgets:
            at = 100.0 * size / cells[0]["base_bytes"]
            ax.axvline(at, color=GREY, linestyle=":", linewidth=0.8, zorder=1)
            above: Any = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
            ax.text(at, 1.01, name, color=GREY, fontsize=SMALL, **above)
        log_ticks(ax)
        ax.set_title(panel.title, pad=10)
    legend(figure, key(seen, rest=any(p.rest for p in shown), joined=len(budgets) > 1), width)
    hidden = sorted({short[n] for f in found.values() for n, points in f.items() if not points})
    without = f" Without bytes: {', '.join(hidden)}." if hidden else ""
    same = []
    for ax, panel in zip(places, shown, strict=True):
        largest = {line.name: found[panel.part][line.name][-1:] for line in panel.named}
        same.append(near(ax, [(short[n], (x, y)) for n, p in largest.items() for x, y, _ in p]))
    return Drawn(figure, " ".join(filter(None, (f"{CAPTION}{without}", told(shown), *same))))


def _points(part: str, by_budget: Sequence[Sequence[Panel]]) -> dict[str, list[Point]]:
    """{label: its points, the fewest bytes first}. What has no budget is there once."""
    found: dict[str, list[Point]] = {}
    for place, shown in enumerate(by_budget):
        for line in (line for panel in shown if panel.part == part for line in panel.lines):
            points = found.setdefault(line.name, [])
            if line.cells[0]["budgeted"] or not place:
                points += _point(line)
    return {name: sorted(points) for name, points in found.items()}


def _point(line: Line) -> list[Point]:
    (op, se), share = line.metric("op"), line.storage()
    return [(share, 100 * op, 100 * se)] if share > 0 and not math.isnan(op) else []


def _draw(
    ax: Axes,
    panel: Panel,
    found: Mapping[str, Sequence[Point]],
    short: Mapping[str, str],
    seen: Looks,
) -> None:
    ax.set_xscale("log")
    named = [line.name for line in panel.named]
    grey: Any = {"color": REST, "marker": "o", "markersize": 2.5, "linewidth": 0.5, "zorder": 1}
    for name in [*(n for n in found if n not in named), *reversed(named)]:
        if found[name]:
            x, y, e = zip(*found[name], strict=True)
            look = seen[short[name]] | {"zorder": 3} if name in named else grey
            bars = None if any(map(math.isnan, e)) else e
            ax.errorbar(x, y, bars, elinewidth=0.6, **look)
    front = pareto([(x, y) for points in found.values() for x, y, _ in points])
    most = max(x for points in found.values() for x, *_ in points)
    xs, ys = zip(*front, (most, front[-1][1]), strict=True)
    ax.step(xs, ys, where="post", color="#9A9A9A", linewidth=0.8, zorder=2)
    roomy(ax)
    ax.grid()
    ax.set_xlabel("bytes alive / tasks, % of the base model")
    ax.set_ylabel("overall performance (OP), %")
