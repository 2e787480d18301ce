"""Figures of a sweep: what was forgotten, when, what remembering costs on disk, and what learning costs in time.

Each function draws the cells of one scenario, model and budget (ReportError for any others);
`aggregate.py` says what a cell is and how cells are averaged over seeds. Scores are in per cent.
Matplotlib is imported only when something is drawn, and pyplot's global state is never touched.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_graft.report.aggregate import KINDS, Line, ReportError, lines_of, number
from cl_graft.report.divergence import drawable, kl_vs_forgetting
from cl_graft.report.panels import Panel, side_by_side
from cl_graft.report.protocols import Cell
from cl_graft.report.routing import confusions, inferred, routed
from cl_graft.report.style import (
    GREY,
    Draw,
    alike,
    looks_of,
    roomy,
    save,
    shortened,
    slant,
    styled,
    title_of,
    wrap,
)
from cl_graft.report.tradeoff import bytes_vs_forgetting, bytes_vs_score

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BANDS = 8  # lines, of which the bands would hide one another if there were more
COLOURS = ("#0072B2", "#D55E00", "#E69F00", "#888888")  # of aggregate.KINDS


@styled
def heatmaps(cells: Sequence[Cell]) -> Figure:
    """The matrix of every label side by side, on one scale of 0 to 100 %.

    Rows are the base model and the experiences, columns the tasks. A frame marks the score of a task
    just learned; an unmeasured cell is grey and hatched.
    """
    lines, title = lines_of(cells), title_of(cells)
    tasks = lines[0].tasks
    learned = frozenset((j + 1, j) for j in range(len(tasks)))
    panels = [Panel(line.title, 100.0 * line.mean, learned) for line in lines]
    experiences = ["base", *(f"after {task}" for task in shortened(tasks))]
    note = "Frame: just learned. Hatched: not measured. Mean over seeds."
    return side_by_side(panels, experiences, tasks, title, "score, %", note)


@styled
def routing(cells: Sequence[Cell]) -> Figure:
    """What prompts were taken for at the end, a panel for each label whose tasks were inferred: per cent of a row.

    Rows are the tasks of the prompts, and general ability where it was measured; columns what they were taken for. A
    frame marks what is right. Raises ReportError where no task was inferred.
    """
    lines, title = routed(cells), title_of(cells)
    if not lines:
        raise ReportError(
            f"no task was inferred in {title}; draw what was taken for what of cells with a router."
        )
    drawn = confusions(lines)
    right = frozenset((j, j) for j in range(len(lines[0].tasks)))
    panels = [Panel(one.name, 100.0 * one.shares, right) for one in drawn]
    rows, columns = shortened(drawn[0].of), drawn[0].taken_for
    note = "Rows: the task of a prompt. Columns: what it was taken for at the end. Frame: right. All seeds together."
    return side_by_side(panels, rows, columns, title, "test prompts, %", note)


@styled
def curves(cells: Sequence[Cell]) -> Figure:
    """The score of each task along the stream: a panel per task, a line per label.

    A band reaches one standard error to either side, where there are no more than BANDS lines; the dotted vertical
    marks the experience that learns the panel's task. Lines are set a little apart in x, or equal ones would hide each
    other; those that are equal throughout are named.
    """
    from matplotlib.figure import Figure

    lines, title = lines_of(cells), title_of(cells)
    tasks, looks = lines[0].tasks, looks_of(lines)
    down = math.ceil(len(tasks) / 3)
    across = math.ceil(len(tasks) / down)
    width = 2.4 * max(across, 2) + 0.5
    names = {line.name: wrap(line.title, 44) for line in lines}
    longest = max(len(part) for name in names.values() for part in name.split("\n"))
    columns = max(1, min(4, len(lines), int(width / (0.062 * longest + 0.55))))
    rows = math.ceil(sum(1 + name.count("\n") for name in names.values()) / columns)
    figure = Figure(figsize=(width, 2.1 * down + 0.9 + 0.17 * rows), layout="constrained")
    axes = list(figure.subplots(down, across, sharey=True, squeeze=False).flat)
    apart, titles = min(0.05, 0.24 / len(lines)), shortened(tasks, 34)
    for j, (ax, title_of_task) in enumerate(zip(axes, titles, strict=False)):
        for k, line in enumerate(lines):
            shift = apart * (k - (len(lines) - 1) / 2)
            _curve(ax, line, j, shift, looks[line.name] | {"label": names[line.name]})
            if len(lines) <= BANDS:
                _band(ax, line, j, shift, looks[line.name]["color"])
        ax.axvline(j + 1, color=GREY, linestyle=":", linewidth=1.0, zorder=1)
        ax.grid(axis="y")
        ax.set_title(title_of_task)
        ax.set_xticks(range(len(tasks) + 1), ["base", *shortened(tasks)], **slant(tasks))
        ax.tick_params(labelbottom=j + across >= len(tasks))
        if j % across == 0:
            ax.set_ylabel("score, %")
    for ax in axes[len(tasks) :]:
        ax.remove()
    figure.suptitle(wrap(title, int(14 * width)))
    roomy(axes[0])
    note = "Score after each experience. Dotted: the experience that learns the task."
    if len(lines) <= BANDS:
        seeds = any(len(s.cells) > 1 for s in lines)
        over = "seeds, of these test examples" if seeds else "examples"
        note += f" Band: ± 1 s.e. over {over}."
    same = alike(
        [(s.title, s.mean) for s in lines], lambda a, b: np.array_equal(a, b, equal_nan=True)
    )
    note = textwrap.fill(f"{note} {same}", int(20 * width))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=note)
    return figure


@styled
def costs(cells: Sequence[Cell]) -> Figure:
    """Seconds of a cell by what they went into, a bar per label, the mean over seeds; peak memory beside it."""
    from matplotlib.figure import Figure

    lines, title = lines_of(cells), title_of(cells)
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
        if not ax.dataLim.width:  # nothing was spent, or nothing is known of it
            ax.set_xlim(0, 1)
    memory.locator_params(axis="x", nbins=3)
    figure.suptitle(wrap(title, 98))
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=len(KINDS))
    return figure


FIGURES: dict[str, Draw] = {  # of every group
    "heatmaps": heatmaps,
    "curves": curves,
    "bytes-vs-score": bytes_vs_score,
    "bytes-vs-forgetting": bytes_vs_forgetting,
    "costs": costs,
}


def figures_of(cells: Sequence[Cell]) -> dict[str, Draw]:
    """FIGURES, and what else there is to draw of these cells of one group."""
    more = {"routing": routing} if any(map(inferred, cells)) else {}
    return FIGURES | more | ({"kl-vs-forgetting": kl_vs_forgetting} if drawable(cells) else {})


def draw(name: str, cells: Sequence[Cell], stem: Path) -> list[Path]:
    """Write one of `figures_of` the cells of one group."""
    return save(figures_of(cells)[name](cells), stem)


def _curve(ax: Axes, line: Line, j: int, shift: float, look: Mapping[str, Any]) -> None:
    x = np.arange(len(line.tasks) + 1) + shift
    ax.plot(x, 100.0 * line.mean[:, j], markersize=4, linewidth=1.2, **look)


def _band(ax: Axes, line: Line, j: int, shift: float, colour: str) -> None:
    x = np.arange(len(line.tasks) + 1) + shift
    mean, se = 100.0 * line.mean[:, j], 100.0 * line.stderr[:, j]
    ax.fill_between(x, mean - se, mean + se, color=colour, alpha=0.15, linewidth=0)
