"""What remembering costs on disk: score and forgetting against bytes."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_graft.report.aggregate import Line, lines_of
from cl_graft.report.protocols import GIVEN, Cell
from cl_graft.report.style import GREY, alike, looks_of, roomy, styled, title_of, wrap

NEAR = 0.02  # of an axis: some three quarters of a marker
ALIVE = "bytes alive after the last task / tasks, % of the base model's bytes"

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@styled
def bytes_vs_score(cells: Sequence[Cell]) -> Figure:
    """OP against the bytes alive, a task, in per cent of the base model's bytes, on a log axis.

    Whiskers are one standard error of OP. The stairs are the Pareto front, one of those that are told the task and one
    of the others; the dashed vertical is the budget. A label that is incomplete or has no pack cannot have a place and
    is named below.
    """
    return _against_bytes(cells, "op", "overall performance (OP), %", better=1)


@styled
def bytes_vs_forgetting(cells: Sequence[Cell]) -> Figure:
    """FM, of which less is better, as `bytes_vs_score` draws OP; one task has none to draw."""
    return _against_bytes(cells, "fm", "forgetting (FM), %", better=-1)


def _against_bytes(cells: Sequence[Cell], metric: str, name: str, better: int) -> Figure:
    from matplotlib.figure import Figure

    lines, title = lines_of(cells), title_of(cells)
    looks, first = looks_of(lines), cells[0]
    placed = {s.name: (s.storage(), 100.0 * s.metric(metric)[0]) for s in lines}
    shown = [s for s in lines if placed[s.name][0] > 0 and not math.isnan(placed[s.name][1])]
    hidden = [_why_not(s.name, s.complete, placed[s.name][0]) for s in lines if s not in shown]
    figure = Figure(figsize=(7.0, max(3.4, 0.9 + 0.25 * len(shown))), layout="constrained")
    ax = figure.subplots()
    ax.set_xscale("log")
    for line in shown:
        (x, y), se = placed[line.name], 100.0 * line.metric(metric)[1]
        style = looks[line.name] | {"linestyle": "none", "markersize": 6.5, "elinewidth": 1}
        label, bar = wrap(line.title, 34), None if math.isnan(se) else se
        ax.errorbar(x, y, yerr=bar, label=label, capsize=2, zorder=3, **style)
    fronts = _fronts(ax, shown, placed, better)
    if fronts:
        handles, labels = ax.get_legend_handles_labels()  # lines come before points with whiskers
        place: Any = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "labelspacing": 0.7}
        ax.legend(handles[fronts:] + handles[:fronts], labels[fronts:] + labels[:fronts], **place)
    if first.get("budget_bytes"):
        budget = 100.0 * first["budget_bytes"] / first["base_bytes"]
        ax.axvline(budget, color=GREY, linestyle="--", linewidth=1.0, zorder=1)
        above: Any = {"transform": ax.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        ax.text(budget, 1.01, f"budget {first['budget']}", color=GREY, **above)
    log_ticks(ax)
    roomy(ax)
    ax.grid()
    ax.set_xlabel(ALIVE)
    ax.set_ylabel(name)
    figure.suptitle(wrap(title, 98))
    notes = [near(ax, [(s.title, placed[s.name]) for s in shown])]
    notes += [f"Not shown: {', '.join(hidden)}."] if hidden else []
    if text := " ".join(filter(None, notes)):
        figure.supxlabel(textwrap.fill(text, 120), fontsize=7, color=GREY)
    return figure


def _fronts(
    ax: Axes, shown: Sequence[Line], placed: Mapping[str, tuple[float, float]], better: int
) -> int:
    """Draw the Pareto front of who is told the task and of who is not; returns how many there are."""
    by_protocol: dict[bool, list[tuple[float, float]]] = {}
    for line in shown:
        by_protocol.setdefault(line.protocol == GIVEN, []).append(placed[line.name])
    for told, points in sorted(by_protocol.items()):
        front = pareto(points, better)
        xs, ys = zip(*front, (max(x for x, _ in points), front[-1][1]), strict=True)
        name = f"Pareto front, {'told' if told else 'not told'} the task"
        name = name if len(by_protocol) > 1 else "Pareto front"
        dash = "--" if told and len(by_protocol) > 1 else "-"
        ax.step(xs, ys, where="post", color="#BBBBBB", linestyle=dash, label=name, zorder=2)
    return len(by_protocol)


def near(ax: Axes, points: Sequence[tuple[str, tuple[float, float]]]) -> str:
    """Which points lie so near on the axes that one hides most of another, as a sentence."""

    def same(a: tuple[float, float], b: tuple[float, float]) -> bool:
        places = (ax.transScale + ax.transLimits).transform([a, b])
        return bool(np.abs(places[0] - places[1]).max() < NEAR)

    return alike(points, same)


def pareto(points: Sequence[tuple[float, float]], better: int = 1) -> list[tuple[float, float]]:
    """The (cost, score) pairs that no other pair matches in both and beats in one, by cost.

    better: 1 where a higher score is, -1 where a lower one is.
    """
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda p: (p[0], -better * p[1])):
        if not front or better * (score - front[-1][1]) > 0:
            front.append((cost, score))
    return front


def _why_not(name: str, complete: bool, share: float) -> str:
    if not complete:
        return name
    return f"{name} (no pack)" if not share > 0 else f"{name} (unmeasured)"


def log_ticks(ax: Axes) -> None:
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
