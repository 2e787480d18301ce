"""Forgetting against KL to the base: how far a model moved on the text that it learned, and what it lost by that.

RL's Razor (arXiv 2509.04259) claims that the forward KL to the base on the new task's text orders what is forgotten,
whatever the method. `cl_graft/evaluation/divergence.py` says what is measured; cells of earlier versions lack it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cl_graft.matrix import FloatArray, PerformanceMatrix
from cl_graft.report.aggregate import Line, estimate, general, groups, lines_of, number
from cl_graft.report.protocols import GIVEN, WHO, Cell
from cl_graft.report.statistics import LEVEL, Interval
from cl_graft.report.style import GREY, looks_of, roomy, styled, title_of, wrap
from cl_graft.report.table import Table, show
from cl_graft.report.tradeoff import log_ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORWARD, REVERSE = "forward", "reverse"  # KL(base || tuned), KL(tuned || base)
DRAWS, LEAST = 1000, 3  # of the bootstrap; points and strategies of which a correlation is told
WIDE = 20.0  # the largest KL over the smallest, from which on the axis is a logarithm
EARLIER, GENERAL = "earlier tasks", "general ability"  # what is lost
NOTE = (
    "KL(base || tuned) in nats a token, after each task on that task's own test examples: both models read the same "
    "prompts and reference answers, and tuned is what answers them. Mean forward and mean reverse, which is "
    "KL(tuned || base), are over the tasks. ±: one standard error over seeds, or over the test examples of one model."
)


class Point(NamedTuple):
    """A cell after a task: who, the task's number (0-based), forward KL in nats a token, and what was lost, of 1."""

    label: str
    task: int
    kl: float
    lost: float


def moved(cell: Cell, direction: str = FORWARD, key: str = "value") -> FloatArray:
    """KL to the base after each task, (T,), nats a token, or its standard error; NaN where it was not measured."""
    told = [*(cell.get("kl_to_base") or []), *[None] * len(cell["tasks"])][: len(cell["tasks"])]
    return np.array([math.nan if each is None else number(each[direction][key]) for each in told])


def measured(cell: Cell) -> bool:
    """Whether it was measured after any task."""
    return not np.isnan(moved(cell)).all()


def lost_earlier(cell: Cell) -> FloatArray:
    """What earlier tasks have lost on average since each was learned, after each task, (T,); NaN after the first."""
    scores = PerformanceMatrix(cell["matrix"], cell["tasks"]).scores
    learned = np.diagonal(scores, -1)
    after = [learned[:t] - scores[t + 1, :t] for t in range(len(learned))]
    return np.array([float(each.mean()) if each.size else math.nan for each in after])


def lost_general(cell: Cell) -> FloatArray:
    """What general ability has lost since the base, after each task, (T,), by the model that the KL is of.

    Where each pack was measured by itself that is the new task's.
    """
    after, by_pack = general(cell)[1:], cell.get("general_packs") or []
    own = [number(row[t]) for t, row in enumerate(by_pack[1:])]
    own += [math.nan] * (len(after) - len(own))
    return general(cell)[0] - np.where(np.isnan(own), after, own)


LOST = {EARLIER: lost_earlier, GENERAL: lost_general}


def points(lines: Sequence[Line], what: str) -> list[Point]:
    """A point for each cell and task after which both were measured. what: one of LOST."""
    found = []
    for line in lines:
        for cell in line.cells:
            pairs = zip(moved(cell), LOST[what](cell), strict=True)
            found += [Point(line.name, t, float(x), float(y)) for t, (x, y) in enumerate(pairs)]
    return [point for point in found if not math.isnan(point.kl + point.lost)]


def drawable(cells: Sequence[Cell]) -> bool:
    """Whether cells of one group have anything to draw of forgetting against KL."""
    if not any(map(measured, cells)):
        return False
    lines = lines_of(cells)
    return any(points(lines, what) for what in LOST)


def table(cells: Sequence[Cell]) -> list[Table]:
    """A table for each group in which KL was measured: a row a label, a column a task, and the mean both ways."""
    tables = []
    for title, members in groups(cells).items():
        if not any(map(measured, members)):
            continue
        lines = lines_of(members)
        columns = (*WHO, *(f"after {task}" for task in lines[0].tasks))
        columns += ("Mean forward", "Mean reverse", "±")
        rows, exact = (
            tuple((*line.who, *_row(line, spec), line.errors) for line in lines)
            for spec in (".3f", ".6f")
        )
        note = " ".join([NOTE, *(told for what in LOST if (told := correlated(lines, what)))])
        parts = tuple(line.part for line in lines)
        tables.append(Table(f"KL to the base: {title}", columns, rows, note, exact, parts))
    return tables


def _row(line: Line, spec: str) -> list[str]:
    each = np.stack([moved(cell) for cell in line.cells]).T
    errors = [estimate(list(values))[1] for values in each]
    if len(line.cells) == 1:
        errors = list(moved(line.cells[0], key="stderr"))
    means = [
        line.over_seeds(lambda cell: float(moved(cell, way).mean()))  # noqa: B023
        for way in (FORWARD, REVERSE)
    ]
    shown = [show(float(v.mean()), spec, e) for v, e in zip(each, errors, strict=True)]
    return shown + [show(mean, spec, error) for mean, error in means]


def files(cells: Sequence[Cell]) -> dict[str, str]:
    """{end of a file's name: its text} of the table of one group; nothing where KL was not measured."""
    return {
        f"kl.{kind}": text
        for made in table(cells)
        for kind, text in (
            ("md", made.markdown() + "\n"),
            ("csv", made.csv()),
            ("tex", made.latex()),
        )
    }


# --- whether the one orders the other ---


def spearman(found: Sequence[Point], within: bool = False) -> Interval:
    """Spearman's rank correlation of KL and loss, with its percentile interval by a bootstrap over labels.

    within: of the points of one task, the mean over tasks, so that no task counts as far because its text is. A label
    is drawn with all its seeds and tasks, since these are no fresh evidence of an order among methods (Efron and
    Tibshirani 1993, chapter 13). NaN for fewer than LEAST points or labels, or where either is the same for all.
    """
    return _spearman(tuple(found), within)


@lru_cache(maxsize=64)  # tables and figures of one report ask for the same
def _spearman(found: tuple[Point, ...], within: bool) -> Interval:
    by_label: dict[str, list[Point]] = {}
    for point in found:
        by_label.setdefault(point.label, []).append(point)
    value, labels = _rho(found, within), list(by_label.values())
    if math.isnan(value) or len(labels) < LEAST:
        return Interval(value, math.nan, math.nan)
    rng, drawn = np.random.default_rng(0), []
    for picked in rng.integers(0, len(labels), (DRAWS, len(labels))):
        drawn.append(_rho([point for k in picked for point in labels[k]], within))
    known = [x for x in drawn if not math.isnan(x)]
    if len(known) < DRAWS / 2:
        return Interval(value, math.nan, math.nan)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), "strategies")


def _rho(found: Sequence[Point], within: bool) -> float:
    from scipy.stats import rankdata

    by_task: dict[int, list[Point]] = {}
    for point in found:
        by_task.setdefault(point.task if within else 0, []).append(point)
    known = []
    for those in by_task.values():
        if len(those) >= LEAST:
            x, y = (rankdata([p[k] for p in those]) for k in (2, 3))
            if np.ptp(x) and np.ptp(y):
                known.append(float(np.corrcoef(x, y)[0, 1]))
    return float(np.mean(known)) if known else math.nan


def correlated(lines: Sequence[Line], what: str) -> str:
    """Sentence with the correlations of those that are not told the task and of those that are; empty without any."""
    parts = []
    for told in (False, True):
        some = [line for line in lines if (line.protocol == GIVEN) == told]
        found = points(some, what)
        if len({point.label for point in found}) < LEAST:  # no order among methods
            continue
        over = {"over all tasks": spearman(found), "within a task": spearman(found, within=True)}
        shown = [f"{_shown(r)} {name}" for name, r in over.items() if not math.isnan(r.mean)]
        if shown:
            count = f"{len(found)} points, {len({p.label for p in found})} rows"
            parts.append(f"{'told' if told else 'not told'} the task {', '.join(shown)} ({count})")
    if not parts:
        return ""
    return f"Spearman's ρ of KL and what {what} lost: {'; '.join(parts)}; 95 % by strategies drawn anew."


def _shown(rho: Interval) -> str:
    ends = "" if math.isnan(rho.low) else f" [{rho.low:.2f}, {rho.high:.2f}]"
    return f"{rho.mean:.2f}{ends}"


# --- drawn ---


@styled
def kl_vs_forgetting(cells: Sequence[Cell]) -> Figure:
    """What was lost against forward KL to the base: a point for each label, seed and task, colours by strategy.

    A panel for what earlier tasks lost since they were learned, and one for what general ability lost since the base,
    where it was measured. Spearman's rank correlations stand below.
    """
    from matplotlib.figure import Figure

    lines, title = lines_of(cells), title_of(cells)
    found = {what: those for what in LOST if (those := points(lines, what))}
    looks = looks_of(lines)
    shown = [line for line in lines if any(p.label == line.name for f in found.values() for p in f)]
    names = {line.name: wrap(line.title, 34) for line in shown}
    rows = sum(1 + name.count("\n") for name in names.values())
    size = (3.3 * len(found) + 2.6, max(3.6, 1.3 + 0.17 * rows))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for ax, (what, those) in zip(panels, found.items(), strict=True):
        _panel(ax, what, those, looks)
    handles = [
        panels[-1].plot([], [], **looks[n] | {"linestyle": "none"}, label=label)[0]
        for n, label in names.items()
    ]
    place: Any = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0), "labelspacing": 0.7}
    panels[-1].legend(handles=handles, **place)
    figure.suptitle(wrap(title, int(14 * size[0])))
    notes = ["A point: a seed after a task.", *(correlated(lines, what) for what in found)]
    hidden = [line.name for line in lines if line not in shown]
    notes += [f"Not shown: {', '.join(hidden)} (unmeasured)."] if hidden else []
    text = textwrap.fill(" ".join(filter(None, notes)), int(17.5 * size[0]))
    figure.supxlabel(text, fontsize=7, color=GREY)
    return figure


def _panel(ax: Axes, what: str, found: Sequence[Point], looks: Mapping[str, Any]) -> None:
    for name in dict.fromkeys(p.label for p in found):
        mine = [p for p in found if p.label == name]
        look = looks[name] | {"linestyle": "none", "markersize": 5}
        ax.plot([p.kl for p in mine], [100.0 * p.lost for p in mine], **look)
    spread(ax, [p.kl for p in found])
    roomy(ax)
    ax.grid()
    ax.set_xlabel("KL(base || tuned) on the new task, nats a token")
    since = "since learned" if what == EARLIER else "since the base"
    ax.set_ylabel(f"lost by {what} {since}, points")


def spread(ax: Axes, kl: Sequence[float]) -> None:
    """Make the axis of KL a logarithm where it is wide enough for one."""
    if min(kl) > 0 and max(kl) > WIDE * min(kl):
        ax.set_xscale("log")
        log_ticks(ax)
