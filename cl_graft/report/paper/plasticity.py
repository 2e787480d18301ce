"""Forgetting against plasticity: how well tasks are learned, and how much of that is lost by the end."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_graft.matrix import PerformanceMatrix
from cl_graft.report.aggregate import Estimate, Line, number
from cl_graft.report.paper.chosen import Looks, Panel, looks, panels, short_names, told
from cl_graft.report.paper.sheet import SMALL, Drawn, axes, key, legend, scattered, styled
from cl_graft.report.protocols import TOLD, Cell
from cl_graft.report.tradeoff import near

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CAPTION = (
    "Forgetting against plasticity: the mean score of the tasks when each was just learned, and what the earlier ones "
    "had lost of it at the end (−BWT). Dotted lines join equal final scores (OP). Whiskers: one standard error over "
    "seeds."
)
NOTHING = 5e-4  # of what is lost that a figure in per cent cannot show


@styled
def plasticity(cells: Sequence[Cell], width: str, wanted: Collection[str] = ()) -> Drawn | None:
    """A point a strategy, a panel for each protocol in which anything was lost; None where there is none."""
    every = panels(cells, wanted)
    shown = [panel for panel in every if any(abs(lost(line)[0]) > NOTHING for line in panel.lines)]
    if not shown:
        return None
    short = short_names(line.name for panel in shown for line in panel.lines)
    seen = looks(shown, short)
    figure, places = axes(width, len(shown), 2.1)
    for ax, panel in zip(places, shown, strict=True):
        _draw(ax, panel, short, seen)
    legend(figure, key(seen, rest=any(panel.rest for panel in shown)), width)
    missing = {panel.part for panel in every} - {panel.part for panel in shown}
    unseen = " Methods that are told the task lost nothing." if TOLD in missing else ""
    same = (near(ax, _named(panel, short)) for ax, panel in zip(places, shown, strict=True))
    return Drawn(figure, " ".join(filter(None, (f"{CAPTION}{unseen}", told(shown), *same))))


def learned(line: Line) -> Estimate:
    """The mean over tasks of the score when each was just learned, with its standard error over seeds."""
    return line.over_seeds(
        lambda cell: float(np.mean(PerformanceMatrix(cell["matrix"], cell["tasks"]).learned()))
    )


def lost(line: Line) -> Estimate:
    """What earlier tasks lost since each was learned: −BWT, with its standard error over seeds."""
    return line.over_seeds(lambda cell: -number(cell["metrics"].get("bwt")))


def _named(panel: Panel, short: Mapping[str, str]) -> list[tuple[str, tuple[float, float]]]:
    """Names and places of those that are named."""
    return [(short[s.name], (100 * learned(s)[0], 100 * lost(s)[0])) for s in panel.named]


def _draw(ax: Axes, panel: Panel, short: Mapping[str, str], seen: Looks) -> None:
    places = {line.name: (learned(line), lost(line)) for line in panel.lines}
    scattered(ax, panel, places, short, seen)
    ax.set_title(panel.title, pad=10)
    ax.set_xlabel("score when just learned, %")
    ax.set_ylabel("lost since (−BWT), points")
    _equal(ax, len(panel.lines[0].tasks))


def _equal(ax: Axes, tasks: int) -> None:
    """Lines of equal OP, which is what was learned less (T - 1) / T of what was lost, marked where they leave."""
    (left, right), (low, high) = ax.get_xlim(), ax.get_ylim()
    slope = tasks / (tasks - 1)
    least, most = left - high / slope, right - low / slope
    step = next(s for s in (1, 2, 5, 10, 20, 50) if (most - least) / s < 6)
    for op in np.arange(max(step, math.ceil(least / step) * step), min(most, 100), step):
        ax.plot(
            [left, right],
            [slope * (left - op), slope * (right - op)],
            ":",
            color="#9A9A9A",
            linewidth=0.6,
            zorder=0,
        )
        x, y = op + high / slope, slope * (right - op)
        note: Any = {"fontsize": SMALL, "color": "#444444"}
        if left <= x <= right - 0.03 * (right - left):
            ax.annotate(
                f"OP {op:g}", (x, high), (0, 1), textcoords="offset points", ha="center", **note
            )
        elif low <= y <= high:
            ax.annotate(
                f"OP {op:g}", (right, y), (2, 0), textcoords="offset points", va="center", **note
            )
    ax.set_xlim(left, right)
    ax.set_ylim(low, high)
