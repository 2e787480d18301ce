"""Score along the stream: the mean over the tasks learned so far, after each of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_graft.matrix import FloatArray
from cl_graft.report.aggregate import Line, number
from cl_graft.report.paper.chosen import Looks, Panel, looks, panels, short_names, told
from cl_graft.report.paper.sheet import REST, SMALL, TYPE, Drawn, axes, styled
from cl_graft.report.protocols import Cell
from cl_graft.report.style import alike, roomy, shortened
from cl_graft.report.tradeoff import NEAR

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Score along the stream: after each task, the mean over the tasks learned so far. Band: one standard error over "
    "{}."
)


@styled
def curves(cells: Sequence[Cell], width: str, wanted: Collection[str] = ()) -> Drawn:
    """A curve a strategy with its band, its name at its end, and grey curves behind, a panel for each protocol."""
    shown = panels(cells, wanted)
    short = short_names(line.name for panel in shown for line in panel.lines)
    seen = looks(shown, short)
    figure, places = axes(width, len(shown), 1.85)
    for ax, panel in zip(places, shown, strict=True):
        _draw(ax, panel, short, seen)
    figure.draw_without_rendering()  # gives the panels their heights
    for ax, panel in zip(places, shown, strict=True):
        _names(figure, ax, panel, short, seen)
    several = any(len(line.cells) > 1 for panel in shown for line in panel.lines)
    over = "seeds, of these test examples" if several else "test examples"
    same = (_alike(ax, panel, short) for ax, panel in zip(places, shown, strict=True))
    return Drawn(figure, " ".join(filter(None, (CAPTION.format(over), told(shown), *same))))


def along(line: Line) -> tuple[FloatArray, FloatArray]:
    """(T,) mean score of the tasks learned so far after each, and its standard error: over seeds, or over the test
    examples of one."""
    t = len(line.tasks)
    each = np.array(
        [
            [np.mean([number(x) for x in cell["matrix"][k][:k]]) for k in range(1, t + 1)]
            for cell in line.cells
        ]
    )
    if len(each) > 1:
        return each.mean(axis=0), each.std(axis=0, ddof=1) / math.sqrt(len(each))
    errors = [math.sqrt(float(np.sum(line.stderr[k, :k] ** 2))) / k for k in range(1, t + 1)]
    return each[0], np.array(errors)


def _draw(ax: Axes, panel: Panel, short: Mapping[str, str], seen: Looks) -> None:
    tasks = panel.lines[0].tasks
    x = np.arange(1, len(tasks) + 1)
    for line in panel.rest:
        ax.plot(x, 100 * along(line)[0], color=REST, linewidth=0.5, zorder=1)
    for line in reversed(panel.named):
        look, (mean, se) = seen[short[line.name]], along(line)
        ax.plot(x, 100 * mean, **look, clip_on=False, zorder=3, markeredgewidth=0.8)
        band: Any = {"color": look["color"], "alpha": 0.15, "linewidth": 0, "zorder": 2}
        ax.fill_between(x, 100 * (mean - se), 100 * (mean + se), **band)
    ax.set_title(panel.title)
    ax.set_ylabel("score of tasks learned, %")
    ax.set_xlim(1 - 0.04 * len(tasks), len(tasks))
    few = len(tasks) <= 5
    ax.set_xticks(x, shortened(tasks, 11) if few else [str(k) for k in x])
    ax.tick_params("x", labelsize=SMALL if few else TYPE)
    ax.set_xlabel("task learned last" if few else "tasks learned")
    ax.grid(axis="y")
    roomy(ax)
    for line in panel.named:  # takes the room of the names
        place: Any = {"transform": ax.transAxes, "fontsize": SMALL, "alpha": 0}
        ax.text(1.07, 0.5, short[line.name], va="center", **place)


def _names(
    figure: Figure,
    ax: Axes,
    panel: Panel,
    short: Mapping[str, str],
    seen: Looks,
) -> None:
    """Names at the ends of their curves, moved apart, each with a line to its own."""
    low, high = ax.get_ylim()
    ends = [100 * float(along(line)[0][-1]) for line in panel.named]
    height = ax.get_window_extent().height / figure.dpi * 72  # points
    wanted = [(end - low) / (high - low) for end in ends]
    for text in list(ax.texts):
        text.remove()
    for line, at, y in zip(panel.named, wanted, apart(wanted, 1.12 * SMALL / height), strict=True):
        look: Any = {"color": seen[short[line.name]]["color"], "transform": ax.transAxes}
        ax.plot([1.02, 1.06], [at, y], linewidth=0.7, clip_on=False, **look)
        place: Any = {"transform": ax.transAxes, "fontsize": SMALL}
        ax.text(1.07, y, short[line.name], va="center", **place)


def _alike(ax: Axes, panel: Panel, short: Mapping[str, str]) -> str:
    """Which of the named curves lie so near throughout that one hides another, as a sentence."""
    low, high = ax.get_ylim()
    least = NEAR * (high - low) / 100
    found = [(short[line.name], along(line)[0]) for line in panel.named]
    return alike(found, lambda a, b: bool(np.abs(a - b).max() < least))


def apart(places: Sequence[float], least: float) -> list[float]:
    """The places, moved as little as need be so that no two are nearer than `least`; within 0 and 1 where they fit.

    Neighbours that are too near are a block around their mean (pool adjacent violators).
    """
    order = sorted(range(len(places)), key=lambda k: places[k])
    blocks: list[list[int]] = []
    starts: list[float] = []
    for k in order:
        blocks.append([k])
        starts.append(places[k])
        while True:
            size = len(blocks[-1])
            middle = sum(places[j] - least * n for n, j in enumerate(blocks[-1])) / size
            starts[-1] = max(0.0, min(middle, 1.0 - least * (size - 1)))
            if len(blocks) < 2 or starts[-2] + least * len(blocks[-2]) <= starts[-1] + 1e-12:
                break
            blocks[-2:], starts[-2:] = [blocks[-2] + blocks[-1]], [0.0]
    moved = list(places)
    for block, start in zip(blocks, starts, strict=True):
        for n, k in enumerate(block):
            moved[k] = start + least * n
    return moved
