"""Grids of shares side by side on one colour scale: forgetting matrices, and what prompts were taken for."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_graft.matrix import FloatArray
from cl_graft.report.style import FRAME, GREY, ink_on, shades, shortened, slant, wrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Panel:
    """A named grid. values: float64 (rows, columns), per cent, NaN where unmeasured. framed: (row, column) places."""

    name: str
    values: FloatArray
    framed: frozenset[tuple[int, int]]


def side_by_side(
    panels: Sequence[Panel],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    scale: str,
    note: str,
) -> Figure:
    """The panels under their names, on one scale of 0 to 100 %; an unmeasured cell is grey and hatched.

    rows, columns: their names, the same for all panels. scale: what the colours stand for. note: stands below.
    """
    from matplotlib.figure import Figure

    # inches of one panel, with a gap and without
    width, height = max(1.55, 0.42 * len(columns) + 0.2), 0.25 * len(rows)
    names = [wrap(panel.name, int(16 * width)) for panel in panels]
    above = 0.12 * max(1 + name.count("\n") for name in names) + 0.13  # inches that a name takes
    across = math.ceil(len(panels) / math.ceil(len(panels) * width / 7.2))
    down = math.ceil(len(panels) / across)
    size = (max(across * width + 1.5, 3.4), down * (height + above) + 1.0)
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    # all panels on one pair of axes: a pair for each takes longer to draw than all that is on them
    right = max(0.2 * len(columns) / (width - 0.2), 0.3)
    grid = _Grid(down, across, len(rows), len(columns), right, above=above / 0.25)
    mesh = _panels(ax, panels, names, rows, columns, grid)
    bar = figure.colorbar(mesh, ax=ax, aspect=15 * down, pad=0.02, label=scale)
    bar.outline.set_visible(False)
    solids: Any = bar.solids
    solids.set_rasterized(False)  # a dark page recolours it
    figure.suptitle(wrap(title, int(14 * size[0])))
    figure.supxlabel(textwrap.fill(note, int(18 * size[0])), fontsize=7, color=GREY)
    return figure


@dataclass(frozen=True)
class _Grid:
    """Panels of `rows` by `columns` cells, so many `down` and `across`; gaps `right` of and `above` them, in cells."""

    down: int
    across: int
    rows: int
    columns: int
    right: float
    above: float

    def place(self, k: int) -> tuple[float, float]:
        """x and y of the upper left corner of panel `k`."""
        row, column = divmod(k, self.across)
        return column * (self.columns + self.right), row * (self.rows + self.above)

    def edges(self) -> tuple[list[float], list[float]]:
        """Where cells begin and end in x and in y, those of the gaps among them."""
        xs = [self.place(k)[0] + j for k in range(self.across) for j in range(self.columns + 1)]
        firsts = range(0, self.down * self.across, self.across)
        return xs, [self.place(k)[1] + i for k in firsts for i in range(self.rows + 1)]

    def slices(self, k: int) -> tuple[slice, slice]:
        """Where panel `k` is among the cells of `edges`."""
        row, column = divmod(k, self.across)
        top, left = row * (self.rows + 1), column * (self.columns + 1)
        return slice(top, top + self.rows), slice(left, left + self.columns)


def _panels(
    ax: Axes,
    panels: Sequence[Panel],
    names: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    grid: _Grid,
) -> QuadMesh:
    """Every panel, under its name."""
    xs, ys = grid.edges()
    colours, values = shades(), np.full((len(ys) - 1, len(xs) - 1), np.nan)
    for k, (panel, name) in enumerate(zip(panels, names, strict=True)):
        x, y = grid.place(k)
        values[grid.slices(k)] = panel.values
        _written(ax, panel, x, y, colours)
        middle: Any = {"ha": "center", "va": "bottom", "in_layout": k < grid.across}
        ax.text(x + grid.columns / 2, y - 0.25, name, fontsize=8, gid="name", **middle)
    look: Any = {"cmap": colours, "vmin": 0, "vmax": 100, "edgecolors": "white", "linewidth": 1}
    mesh = ax.pcolormesh(xs, ys, np.ma.masked_invalid(values), zorder=0, **look)
    ax.set_ylim(ys[-1], -0.25)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    firsts = range(min(grid.across, len(panels)))
    middles = [grid.place(k)[0] + j + 0.5 for k in firsts for j in range(grid.columns)]
    ax.set_xticks(middles, shortened(columns) * len(firsts), **slant(columns))
    tops = [grid.place(k)[1] for k in range(0, len(panels), grid.across)]
    ax.set_yticks([y + i + 0.5 for y in tops for i in range(grid.rows)], [*rows] * grid.down)
    return mesh


def _written(ax: Axes, panel: Panel, x: float, y: float, colours: Colormap) -> None:
    """What is written on a panel's cells, and its frames."""
    from matplotlib.patches import Rectangle

    middle: Any = {"ha": "center", "va": "center", "fontsize": 7, "gid": "score"}
    frame: Any = {"fill": False, "edgecolor": FRAME, "linewidth": 1.6, "clip_on": False}
    for i, row in enumerate(panel.values):
        for j, share in enumerate(row):
            at = (x + j, y + i)
            if math.isnan(share):
                blank = Rectangle(at, 1, 1, facecolor="#E8E8E8", hatch="/////", linewidth=0)
                ax.add_patch(blank)
                continue
            ink = ink_on(colours(share / 100.0))
            # it lies within its axes, and there are many
            more: Any = {"color": ink, "in_layout": False}
            ax.text(at[0] + 0.5, at[1] + 0.5, f"{share:.1f}", **more, **middle)
            if (i, j) in panel.framed:
                ax.add_patch(Rectangle(at, 1, 1, **frame))
