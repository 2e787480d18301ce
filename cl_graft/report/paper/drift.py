"""Forgetting against KL to the base: what was lost, by how far the model moved on the text that it learned."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_graft.report.aggregate import Line
from cl_graft.report.divergence import LOST, Point, correlated, points, spread
from cl_graft.report.paper.chosen import Looks, Panel, looks, panels, short_names, told
from cl_graft.report.paper.sheet import REST, Drawn, axes, key, legend, styled
from cl_graft.report.protocols import Cell
from cl_graft.report.style import roomy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAPTION = (
    "Forgetting against KL(base || tuned) on the text of the task that was just learned, in nats a token: what earlier "
    "tasks had lost since each was learned, and general ability since the base. A point: a strategy after a task."
)
SEEN = 5e-4  # of a loss that a figure in per cent shows


@styled
def drift(cells: Sequence[Cell], width: str, wanted: Collection[str] = ()) -> Drawn | None:
    """A panel for each protocol and loss in which there is any; None where KL or losses were not measured."""
    every = panels(cells, wanted)
    drawn = [
        (panel, what, found)
        for panel in every
        for what in LOST
        if (found := points(panel.lines, what)) and any(abs(p.lost) > SEEN for p in found)
    ]
    if not drawn:
        return None
    shown = [panel for panel in every if any(panel is other for other, *_ in drawn)]
    short = short_names(line.name for panel in shown for line in panel.lines)
    seen = looks(shown, short)
    figure, places = axes(width, len(drawn), 1.9)
    for ax, (panel, what, found) in zip(places, drawn, strict=True):
        _draw(ax, panel, what, found, short, seen)
    legend(figure, key(seen, rest=any(panel.rest for panel in shown)), width)
    rho = " ".join(filter(None, (correlated([x for p in every for x in p.lines], w) for w in LOST)))
    return Drawn(figure, f"{CAPTION} {told(shown)} {rho}".rstrip())


def means(line: Line, found: Sequence[Point]) -> list[tuple[float, float]]:
    """KL and loss after each task, the means over seeds. found: of one loss, of any lines."""
    own = [point for point in found if point.label == line.name]
    tasks = sorted({point.task for point in own})
    each = ([p for p in own if p.task == task] for task in tasks)
    return [(_mean([p.kl for p in those]), _mean([p.lost for p in those])) for those in each]


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _draw(
    ax: Axes,
    panel: Panel,
    what: str,
    found: Sequence[Point],
    short: Mapping[str, str],
    seen: Looks,
) -> None:
    grey: Any = {"color": REST, "marker": "o", "markersize": 2.2, "zorder": 1}
    for line in (*panel.rest, *reversed(panel.named)):
        if own := means(line, found):
            look = seen[short[line.name]] | {"zorder": 3} if line in panel.named else grey
            x, y = zip(*own, strict=True)
            ax.plot(x, [100 * lost for lost in y], **look | {"linestyle": "none"})
    spread(ax, [x for line in panel.lines for x, _ in means(line, found)])
    roomy(ax)
    ax.grid()
    ax.set_title(f"{panel.title}: {what}")
    ax.set_xlabel("KL to the base, nats a token")
    ax.set_ylabel("lost, points")
