"""Figures of a sweep: what was forgotten, when, what remembering costs on disk, and what learning costs in time.

Each function draws the cells of one scenario, model and budget (ReportError for any others);
`series.py` says what a cell is and how cells are averaged over seeds. Scores are in per cent.
Matplotlib is imported only when something is drawn, and pyplot's global state is never touched.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft.report.series import Cell, Series, groups, number, series, slugged
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
    from matplotlib.figure import Figure

COSTS = (
    ("train", "#0072B2"),
    ("compress", "#D55E00"),
    ("evaluate", "#E69F00"),
    ("harness", "#888888"),
)


@styled
def heatmaps(cells: Sequence[Cell]) -> Figure:
    """The matrix of every label side by side, on one scale of 0 to 100 %.

    Rows are the base model and the stages, columns the tasks. A frame marks the score of a task
    just learned; an unmeasured cell is grey and hatched.
    """
    from matplotlib.figure import Figure

    lines, title = series(cells), title_of(cells)
    t = len(lines[0].tasks)
    width, height = max(1.55, 0.42 * t + 0.2), 0.25 * (t + 1) + 0.5  # inches of one panel
    down = math.ceil(len(lines) * width / 7.2)
    across = math.ceil(len(lines) / down)
    size = (max(across * width + 1.5, 3.4), down * height + 1.3)
    figure = Figure(figsize=size, layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False).flat)
    for k, (ax, line) in enumerate(zip(axes, lines, strict=False)):
        mesh = _heatmap(ax, line, int(16 * width))
        ax.tick_params(labelleft=k % across == 0, labelbottom=k + across >= len(lines))
    for ax in axes[len(lines) :]:
        ax.remove()
    used = axes[: len(lines)]
    bar = figure.colorbar(mesh, ax=used, aspect=15 * down, pad=0.02, label="score, %")
    bar.outline.set_visible(False)
    figure.suptitle(wrap(title, int(14 * size[0])))
    note = "Frame: just learned. Hatched: not measured. Mean over seeds."
    figure.supxlabel(textwrap.fill(note, int(18 * size[0])), fontsize=7, color=GREY)
    return figure


@styled
def curves(cells: Sequence[Cell]) -> Figure:
    """The score of each task along the stream: a panel per task, a line per label.

    A band reaches one standard error to either side; the dotted vertical marks the stage that
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
    note = "Score after each stage. Dotted: the stage that learns the task. Band: ± 1 s.e."
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
    left = [0.0] * len(lines)
    for kind, colour in COSTS:
        found = [
            line.over_seeds(lambda c: number((c.get("seconds") or {}).get(kind)))[0]  # noqa: B023
            for line in lines
        ]
        widths = [0.0 if math.isnan(x) else x for x in found]
        time.barh(range(len(lines)), widths, 0.66, left, color=colour, label=kind)
        left = [a + b for a, b in zip(left, widths, strict=True)]
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
    figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=len(COSTS))
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


def _heatmap(ax: Axes, line: Series, characters: int) -> QuadMesh:
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    t, colours = len(line.tasks), colormaps["Blues"]
    look: Any = {"cmap": colours, "vmin": 0, "vmax": 100, "edgecolors": "white", "linewidth": 1}
    mesh = ax.pcolormesh(100.0 * line.mean, **look)
    middle: Any = {"ha": "center", "va": "center", "fontsize": 7}
    frame: Any = {"fill": False, "edgecolor": FRAME, "linewidth": 1.6, "clip_on": False}
    for i in range(t + 1):
        for j in range(t):
            score = 100.0 * float(line.mean[i, j])
            if math.isnan(score):
                blank = Rectangle((j, i), 1, 1, facecolor="#E8E8E8", hatch="/////", linewidth=0)
                ax.add_patch(blank)
                continue
            ink = ink_on(colours(score / 100.0))
            written = ax.text(j + 0.5, i + 0.5, f"{score:.1f}", color=ink, **middle)
            written.set_in_layout(False)  # it lies within its axes, and there are many
            if i == j + 1:
                ax.add_patch(Rectangle((j, i), 1, 1, **frame))
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_xticks([j + 0.5 for j in range(t)], list(map(short, line.tasks)), **slant(line.tasks))
    stages = ["base", *(f"after {short(task)}" for task in line.tasks)]
    ax.set_yticks([i + 0.5 for i in range(t + 1)], stages)
    ax.set_title(wrap(line.name, characters))
    return mesh


def _curve(ax: Axes, line: Series, j: int, shift: float, look: Mapping[str, Any]) -> None:
    x = [stage + shift for stage in range(len(line.tasks) + 1)]
    mean, se = 100.0 * line.mean[:, j], 100.0 * line.stderr[:, j]
    ax.plot(x, mean, markersize=4, linewidth=1.2, **look)
    ax.fill_between(x, mean - se, mean + se, color=look["color"], alpha=0.15, linewidth=0)
