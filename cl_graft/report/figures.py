"""Figures of a sweep: what was forgotten, when, and what remembering costs on disk.

Each function draws the cells of one scenario, model and budget (ReportError for any others);
`tables.py` says what a cell is and how cells are averaged over seeds. Scores are in per cent.
Matplotlib is imported only when something is drawn, and pyplot's global state is never touched.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft.report.tables import Cell, Series, groups, series, slugged, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

# First Okabe and Ito's colours, which readers with any common colour blindness tell apart (a brown
# stands in for their yellow, too light on white), then five of Paul Tol's; markers differ as well.
PALETTE = (
    *("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5230", "#000000"),
    *("#882255", "#332288", "#999933", "#888888", "#117733"),
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")
# The place of a strategy here is its colour and marker in every figure, and a name that is not here
# gets a place by its hash. Append only: another order would repaint the figures already published.
KNOWN = (
    *("graftllm", "lora", "model_grafting", "model_tailor", "magnitude", "task_arithmetic"),
    *("sequential", "joint", "individual", "ties", "replay", "ewc", "olora", "dare", "svd"),
)
LINES = ("-", "--", "-.")
FILLS = ("full", "none", "left", "top", "right", "bottom")
FRAME, GREY = "#D55E00", "#444444"
STYLE: Any = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "figure.titlesize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.title_fontsize": 7.0,
    "hatch.linewidth": 0.5,
    "hatch.color": "#9A9A9A",
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "cl-graft",  # without it the ids of an SVG's elements are random
}


def _styled(draw: Callable[[Sequence[Cell]], Figure]) -> Callable[[Sequence[Cell]], Figure]:
    @functools.wraps(draw)
    def drawn(cells: Sequence[Cell]) -> Figure:
        import matplotlib

        with matplotlib.rc_context(STYLE):
            return draw(cells)

    return drawn


@_styled
def heatmaps(cells: Sequence[Cell]) -> Figure:
    """The matrix of every label side by side, on one scale of 0 to 100 %.

    Rows are the base model and the stages, columns the tasks. A frame marks the score of a task
    just learned; an unmeasured cell is grey and hatched.
    """
    from matplotlib.figure import Figure

    lines, title = series(cells), _title(cells)
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
    figure.suptitle(_wrap(title, int(14 * size[0])))
    note = "Frame: just learned. Hatched: not measured. Mean over seeds."
    figure.supxlabel(textwrap.fill(note, int(18 * size[0])), fontsize=7, color=GREY)
    return figure


@_styled
def curves(cells: Sequence[Cell]) -> Figure:
    """The score of each task along the stream: a panel per task, a line per label.

    A band reaches one standard error to either side; the dotted vertical marks the stage that
    learns the panel's task. Lines are set a little apart in x, or equal ones would hide each other.
    """
    from matplotlib.figure import Figure

    lines, title = series(cells), _title(cells)
    tasks, looks = lines[0].tasks, _looks(lines)
    down = math.ceil(len(tasks) / 3)
    across = math.ceil(len(tasks) / down)
    width = 2.4 * max(across, 2) + 0.5
    names = {line.name: _wrap(line.name, 44) for line in lines}
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
        ax.set_title(_short(task, 34))
        ax.set_xticks(range(len(tasks) + 1), ["base", *map(_short, tasks)], **_slant(tasks))
        ax.tick_params(labelbottom=j + across >= len(tasks))
        if j % across == 0:
            ax.set_ylabel("score, %")
    for ax in axes[len(tasks) :]:
        ax.remove()
    figure.suptitle(_wrap(title, int(14 * width)))
    note = "Score after each stage. Dotted: the stage that learns the task. Band: ± 1 s.e."
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, title=note)
    return figure


@_styled
def bytes_vs_score(cells: Sequence[Cell]) -> Figure:
    """OP against the largest pack of a task in per cent of the base model's bytes, on a log axis.

    Whiskers are one standard error of OP. The stairs are the Pareto front, the dashed vertical the
    budget. A label that is incomplete or has no pack cannot have a place and is named below.
    """
    from matplotlib.figure import Figure

    lines, title = series(cells), _title(cells)
    looks, first = _looks(lines), cells[0]
    placed = {s.name: (s.storage(), 100.0 * s.metric("op")[0]) for s in lines}
    shown = [s for s in lines if placed[s.name][0] > 0 and not math.isnan(placed[s.name][1])]
    hidden = [s.name if not s.complete else f"{s.name} (no pack)" for s in lines if s not in shown]
    figure = Figure(figsize=(7.0, max(3.4, 0.9 + 0.25 * len(shown))), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("log")
    for line in shown:
        (x, y), se = placed[line.name], 100.0 * line.metric("op")[1]
        style = looks[line.name] | {"linestyle": "none", "markersize": 6.5, "elinewidth": 1}
        label, bar = _wrap(line.name, 34), None if math.isnan(se) else se
        ax.errorbar(x, y, yerr=bar, label=label, capsize=2, zorder=3, **style)
    if front := pareto([placed[s.name] for s in shown]):
        widest = max(placed[s.name][0] for s in shown)
        xs, ys = zip(*front, (widest, front[-1][1]), strict=True)
        ax.step(xs, ys, where="post", color="#BBBBBB", label="Pareto front", zorder=2)
        handles, labels = ax.get_legend_handles_labels()  # lines come before points with whiskers
        place: Any = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "labelspacing": 0.7}
        ax.legend(handles[1:] + handles[:1], labels[1:] + labels[:1], **place)
    if first.get("budget_bytes"):
        budget = 100.0 * first["budget_bytes"] / first["base_bytes"]
        ax.axvline(budget, color=GREY, linestyle="--", linewidth=1.0, zorder=1)
        above: Any = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        ax.text(budget, 1.01, f"budget {first['budget']}", color=GREY, **above)
    _log_ticks(ax)
    ax.grid()
    ax.set_xlabel("largest pack of a task, % of the base model's bytes")
    ax.set_ylabel("overall performance (OP), %")
    figure.suptitle(_wrap(title, 98))
    if hidden:
        text = textwrap.fill(f"Not shown: {', '.join(hidden)}.", 120)
        figure.supxlabel(text, fontsize=7, color=GREY)
    return figure


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, score) pairs that no other pair matches in both and beats in one, by cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def write_figures(cells: Sequence[Cell], folder: Path | str) -> list[Path]:
    """Writes every figure of each group as PNG (150 dpi) and SVG; returns the files.

    The bytes depend on the cells and on the version of matplotlib alone.
    """
    import matplotlib

    written = []
    for slug, members in slugged(groups(cells)):
        for draw in (heatmaps, curves, bytes_vs_score):
            figure = draw(members)
            for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                data = io.BytesIO()
                with matplotlib.rc_context(STYLE):
                    figure.savefig(data, format=kind, dpi=150, metadata=metadata)
                name = f"{slug}-{draw.__name__.replace('_', '-')}.{kind}"
                written.append(write_atomic(Path(folder) / name, data.getvalue()))
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
            ink = _ink(colours(score / 100.0))
            ax.text(j + 0.5, i + 0.5, f"{score:.1f}", color=ink, **middle)
            if i == j + 1:
                ax.add_patch(Rectangle((j, i), 1, 1, **frame))
    ax.invert_yaxis()
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_xticks([j + 0.5 for j in range(t)], list(map(_short, line.tasks)), **_slant(line.tasks))
    stages = ["base", *(f"after {_short(task)}" for task in line.tasks)]
    ax.set_yticks([i + 0.5 for i in range(t + 1)], stages)
    ax.set_title(_wrap(line.name, characters))
    return mesh


def _curve(ax: Axes, line: Series, j: int, shift: float, look: Mapping[str, Any]) -> None:
    x = [stage + shift for stage in range(len(line.tasks) + 1)]
    mean, se = 100.0 * line.mean[:, j], 100.0 * line.stderr[:, j]
    ax.plot(x, mean, markersize=4, linewidth=1.2, **look)
    ax.fill_between(x, mean - se, mean + se, color=look["color"], alpha=0.15, linewidth=0)


def _looks(lines: Sequence[Series]) -> dict[str, dict[str, Any]]:
    """Colour and marker by strategy; dash and fill by label within the strategy."""
    places: dict[str, int] = {}
    labels: dict[str, int] = {}
    looks: dict[str, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda s: (s.strategy not in KNOWN, s.strategy, s.name)):
        if line.strategy not in places:
            place = _place(line.strategy)
            while place in places.values():  # rare, but two strategies never look the same
                place += 1
            places[line.strategy] = place
        place, nth = places[line.strategy], labels.get(line.strategy, 0)
        labels[line.strategy] = nth + 1
        looks[line.name] = {
            "color": PALETTE[place % len(PALETTE)],
            "marker": MARKERS[place % len(MARKERS)],
            "fillstyle": FILLS[nth % len(FILLS)],
            "linestyle": LINES[nth % len(LINES)] if line.complete else ":",
        }
    return looks


def _place(strategy: str) -> int:
    """13 colours and 9 markers have no common factor: 117 places that all look different."""
    if strategy in KNOWN:
        return KNOWN.index(strategy)
    rest = len(PALETTE) * len(MARKERS) - len(KNOWN)
    return len(KNOWN) + int(hashlib.sha256(strategy.encode()).hexdigest(), 16) % rest


def _ink(rgba: Sequence[float]) -> str:
    """Black or white, whichever has more contrast on the colour (WCAG 2.1 relative luminance)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "white" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "black"


def _log_ticks(ax: Axes) -> None:
    """Room to either side, and plain numbers at as many places of a decade as do not crowd."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_xlim()
    low, high = low / 1.5, high * 1.5
    ax.set_xlim(low, high)
    many, some = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0), (1.0, 2.0, 5.0)
    subs = many if high / low < 12 else some if high / low < 500 else (1.0,)
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.xaxis.set_minor_formatter(NullFormatter())


def _title(cells: Sequence[Cell]) -> str:
    return next(iter(groups(cells)))


def _wrap(name: str, most: int) -> str:
    """A name too long for one line is broken before its options and after their commas."""
    return name if len(name) <= most else textwrap.fill(re.sub(r"(?<=\S)\(", " (", name), most)


def _short(name: str, most: int = 14) -> str:
    """A long name loses its middle: both ends tell tasks apart."""
    return name if len(name) <= most else f"{name[: most - 6]}…{name[-5:]}"


def _slant(tasks: Sequence[str]) -> dict[str, Any]:
    if len(tasks) > 6:
        return {"rotation": 90, "fontsize": 7}
    long = max(map(len, tasks)) > 6
    return {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if long else {}
