"""Figures of a sweep: what was forgotten, when, what remembering costs on disk, and what learning costs in time.

Each function draws the cells of one scenario, model and budget (ReportError for any others);
`aggregate.py` says what a cell is and how cells are averaged over seeds. Scores are in per cent.
Matplotlib is imported only when something is drawn, and pyplot's global state is never touched.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_graft.report.aggregate import KINDS, Cell, Series, groups, number, series, slugged
from cl_graft.report.style import (
    FRAME,
    GREY,
    Draw,
    ink_on,
    looks_of,
    save,
    short,
    slant,
    styled,
    title_of,
    wrap,
)
from cl_graft.report.tradeoff import bytes_vs_forgetting, bytes_vs_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#888888")  # of aggregate.KINDS


@styled
def heatmaps(cells: Sequence[Cell]) -> Figure:
    """The matrix of every label side by side, on one scale of 0 to 100 %.

    Rows are the base model and the experiences, columns the tasks. A frame marks the score of a task
    just learned; an unmeasured cell is grey and hatched.
    """
    from matplotlib.figure import Figure

    lines, title = series(cells), title_of(cells)
    t = len(lines[0].tasks)
    width, height = (
        max(1.55, 0.42 * t + 0.2),
        0.25 * (t + 1),
    )  # inches of one panel, with a gap and without
    names = [wrap(line.name, int(16 * width)) for line in lines]
    above = 0.12 * max(1 + name.count("\n") for name in names) + 0.13  # inches that a name takes
    across = math.ceil(len(lines) / math.ceil(len(lines) * width / 7.2))
    down = math.ceil(len(lines) / across)
    size = (max(across * width + 1.5, 3.4), down * (height + above) + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    # all panels on one pair of axes: a pair for each takes longer to draw than all that is on them
    grid = _Grid(down, across, t, right=max(0.2 * t / (width - 0.2), 0.3), above=above / 0.25)
    mesh = _panels(ax, lines, names, grid)
    bar = figure.colorbar(mesh, ax=ax, aspect=15 * down, pad=0.02, label="score, %")
    bar.outline.set_visible(False)
    figure.suptitle(wrap(title, int(14 * size[0])))
    note = "Frame: just learned. Hatched: not measured. Mean over seeds."
    figure.supxlabel(textwrap.fill(note, int(18 * size[0])), fontsize=7, color=GREY)
    return figure


@styled
def curves(cells: Sequence[Cell]) -> Figure:
    """The score of each task along the stream: a panel per task, a line per label.

    A band reaches one standard error to either side; the dotted vertical marks the experience that
    learns the panel's task. Lines are set a little apart in x, or equal ones would hide each other.
    """
    from matplotlib.figure import Figure

    lines, title = series(cells), title_of(cells)
    tasks, looks = lines[0].tasks, looks_of(lines)
    down = math.ceil(len(tasks) / 3)
    across = math.ceil(len(tasks) / down)
    width = 2.4 * max(across, 2) + 0.5
    names = {line.name: wrap(line.name, 44) for line in lines}
    longest = max(len(part) for name in names.values() for part in name.split("\n"))
    columns = max(1, min(4, len(lines), int(width / (0.062 * longest + 0.55))))
    rows = math.ceil(sum(1 + name.count("\n") for name in names.values()) / columns)
    figure = Figure(figsize=(width, 2.1 * down + 0.9 + 0.17 * rows), layout="constrained")
    axes = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    apart = min(0.05, 0.24 / len(lines))
    for j, (ax, task) in enumerate(zip(axes, tasks, strict=False)):
        for k, line in enumerate(lines):
            shift = apart * (k - (len(lines) - 1) / 2)
            _curve(ax, line, j, shift, looks[line.name] | {"label": names[line.name]})
        ax.axvline(j + 1, color=GREY, linestyle=":", linewidth=1.0, zorder=1)
        ax.grid(axis="y")
        ax.set_title(short(task, 34))
        ax.set_xticks(range(len(tasks) + 1), ["base", *map(short, tasks)], **slant(tasks))
        ax.tick_params(labelbottom=j + across >= len(tasks))
        if j % across == 0:
            ax.set_ylabel("score, %")
    for ax in axes[len(tasks) :]:
        ax.remove()
    figure.suptitle(wrap(title, int(14 * width)))
    note = (
        "Score after each experience. Dotted: the experience that learns the task. Band: ± 1 s.e."
    )
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=note)
    return figure


@styled
def costs(cells: Sequence[Cell]) -> Figure:
    """Seconds of a cell by what they went into, a bar per label, the mean over seeds; peak memory beside it."""
    from matplotlib.figure import Figure

    lines, title = series(cells), title_of(cells)
    names = [wrap(line.name, 40) for line in lines]
    height = 1.1 + sum(0.17 * (1 + name.count("\n")) + 0.06 for name in names)
    figure = Figure(figsize=(7.2, max(2.0, height)), layout="constrained")
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    left, spent = np.zeros(len(lines)), np.nan_to_num([line.seconds() for line in lines])
    for kind, colour, widths in zip(KINDS, COLOURS, spent.T, strict=True):
        time.barh(range(len(lines)), widths, 0.66, left, color=colour, label=kind)
        left = left + widths
    peaks = [line.over_seeds(lambda c: number(c.get("peak_memory_mb")))[0] for line in lines]
    memory.barh(
        range(len(lines)), [0.0 if math.isnan(x) else x for x in peaks], 0.66, color="#999933"
    )
    time.set_yticks(range(len(lines)), names)
    time.invert_yaxis()
    for ax, label in ((time, "seconds of a cell"), (memory, "peak memory, MiB")):
        ax.set_xlabel(label)
        ax.grid(axis="x")
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
    memory.locator_params(axis="x", nbins=3)
    figure.suptitle(wrap(title, 98))
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS))
    return figure


FIGURES: dict[str, Draw] = {
    "heatmaps": heatmaps,
    "curves": curves,
    "bytes-vs-score": bytes_vs_score,
    "bytes-vs-forgetting": bytes_vs_forgetting,
    "costs": costs,
}


def draw(name: str, cells: Sequence[Cell], stem: Path) -> list[Path]:
    """Write one of FIGURES for the cells of one group."""
    return save(FIGURES[name](cells), stem)


def write_figures(cells: Sequence[Cell], folder: Path | str) -> list[Path]:
    """Writes every figure of each group as `style.save` does; returns the files."""
    written = []
    for slug, members in slugged(groups(cells)):
        for name in FIGURES:
            written += draw(name, members, Path(folder) / f"{slug}-{name}")
    return written


@dataclass(frozen=True)
class _Grid:
    """Panels of `t` by `t` + 1 cells, so many `down` and `across`; gaps to their `right` and `above` them, in cells."""

    down: int
    across: int
    t: int
    right: float
    above: float

    def place(self, k: int) -> tuple[float, float]:
        """x and y of the upper left corner of panel `k`."""
        row, column = divmod(k, self.across)
        return column * (self.t + self.right), row * (self.t + 1 + self.above)

    def edges(self) -> tuple[list[float], list[float]]:
        """Where cells begin and end in x and in y, those of the gaps among them."""
        xs = [self.place(k)[0] + j for k in range(self.across) for j in range(self.t + 1)]
        rows = range(0, self.down * self.across, self.across)
        return xs, [self.place(k)[1] + i for k in rows for i in range(self.t + 2)]

    def slices(self, k: int) -> tuple[slice, slice]:
        """Where panel `k` is among the cells of `edges`."""
        row, column = divmod(k, self.across)
        top, left = row * (self.t + 2), column * (self.t + 1)
        return slice(top, top + self.t + 1), slice(left, left + self.t)


def _panels(ax: Axes, lines: Sequence[Series], names: Sequence[str], grid: _Grid) -> QuadMesh:
    """The matrix of every line, under its name."""
    from matplotlib import colormaps

    xs, ys = grid.edges()
    colours, values = colormaps["Blues"], np.full((len(ys) - 1, len(xs) - 1), np.nan)
    tasks = list(map(short, lines[0].tasks))
    for k, (line, name) in enumerate(zip(lines, names, strict=True)):
        x, y = grid.place(k)
        values[grid.slices(k)] = 100.0 * line.mean
        _matrix(ax, line, x, y, colours)
        middle: Any = {"ha": "center", "va": "bottom", "in_layout": k < grid.across}
        ax.text(x + grid.t / 2, y - 0.25, name, fontsize=8, gid="name", **middle)
    look: Any = {"cmap": colours, "vmin": 0, "vmax": 100, "edgecolors": "white", "linewidth": 1}
    mesh = ax.pcolormesh(xs, ys, np.ma.masked_invalid(values), zorder=0, **look)
    ax.set_ylim(ys[-1], -0.25)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    columns = range(min(grid.across, len(lines)))
    middles = [grid.place(k)[0] + j + 0.5 for k in columns for j in range(grid.t)]
    ax.set_xticks(middles, tasks * len(columns), **slant(lines[0].tasks))
    experiences = ["base", *(f"after {task}" for task in tasks)]
    tops = [grid.place(k)[1] for k in range(0, len(lines), grid.across)]
    ax.set_yticks([y + i + 0.5 for y in tops for i in range(grid.t + 1)], experiences * grid.down)
    return mesh


def _matrix(ax: Axes, line: Series, x: float, y: float, colours: Colormap) -> None:
    """What is written on a panel's cells, and its frames."""
    from matplotlib.patches import Rectangle

    middle: Any = {"ha": "center", "va": "center", "fontsize": 7, "gid": "score"}
    frame: Any = {"fill": False, "edgecolor": FRAME, "linewidth": 1.6, "clip_on": False}
    for i, row in enumerate(line.mean):
        for j, score in enumerate(100.0 * row):
            at = (x + j, y + i)
            if math.isnan(score):
                blank = Rectangle(at, 1, 1, facecolor="#E8E8E8", hatch="/////", linewidth=0)
                ax.add_patch(blank)
                continue
            ink = ink_on(colours(score / 100.0))
            # it lies within its axes, and there are many
            more: Any = {"color": ink, "in_layout": False}
            ax.text(at[0] + 0.5, at[1] + 0.5, f"{score:.1f}", **more, **middle)
            if i == j + 1:
                ax.add_patch(Rectangle(at, 1, 1, **frame))


def _curve(ax: Axes, line: Series, j: int, shift: float, look: Mapping[str, Any]) -> None:
    x = [experience + shift for experience in range(len(line.tasks) + 1)]
    mean, se = 100.0 * line.mean[:, j], 100.0 * line.stderr[:, j]
    ax.plot(x, mean, markersize=4, linewidth=1.2, **look)
    ax.fill_between(x, mean - se, mean + se, color=look["color"], alpha=0.15, linewidth=0)
