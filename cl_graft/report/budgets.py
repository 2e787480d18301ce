"""One strategy at several budgets: what is kept of full fine-tuning's gain, and for how many bytes.

The shape of the paper's figures 7 and 8 (arXiv 2505.18502): score against storage, a line a strategy, with the base
model and full fine-tuning as the two levels between which all of them lie.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from cl_graft.report.aggregate import Estimate, estimate, number, storage, told_apart
from cl_graft.report.protocols import PARTS, PROTOCOLS, WHO, Cell, distinct, part, protocol, titled
from cl_graft.report.style import GREY, looks_of, roomy, save, styled, wrap
from cl_graft.report.table import Table, show
from cl_graft.report.tradeoff import ALIVE, log_ticks, near

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = "individual"  # the reference: each task's own full fine-tuning


class _Line(NamedTuple):
    name: str
    strategy: str
    complete: bool = True


def groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Complete cells of each scenario and model that were run at two budgets or more."""
    grouped: dict[str, list[Cell]] = {}
    for cell in told_apart(distinct(cells)):
        if cell["complete"]:
            grouped.setdefault(f"{cell['scenario']} · {cell['model']}", []).append(cell)
    return {t: members for t, members in grouped.items() if len({c["budget"] for c in members}) > 1}


def table(title: str, cells: Sequence[Cell]) -> Table:
    """OP and the share of full fine-tuning's gain by budget, with errors over seeds."""
    by_label = _by_label(cells)
    budgets = sorted({c["budget"] for c in cells}, key=lambda b: _size(cells, b))
    rows = []
    for label, members in by_label.items():
        row = [label, protocol(members[0]), "each" if members[0]["budgeted"] else "none"]
        for budget in budgets:
            row += [_show(_op(members, budget)), _show(_kept(cells, members, budget))]
        rows.append(tuple(row))
    columns = list(WHO)
    for budget in budgets:
        columns += [f"OP at {budget}", f"kept at {budget}"]
    note = (
        "OP: mean final score in per cent. Kept: per cent of the gain of full fine-tuning (individual) over the base "
        "model, seed by seed. ± is the standard error over seeds, for these test examples alone. "
        + PROTOCOLS
    )
    parts = tuple(part(members[0]) for members in by_label.values())
    return Table(f"{title}: by budget", tuple(columns), tuple(rows), note, parts=parts)


@styled
def figure(title: str, cells: Sequence[Cell]) -> Figure:
    """OP against the bytes alive, a task, in per cent of the base model, on a log axis.

    Whiskers are one standard error over seeds; the horizontals are the base model and full fine-tuning.
    """
    from matplotlib.figure import Figure

    lines = {_Line(m[0]["label"], m[0]["strategy"]): m for m in _by_label(cells).values()}
    lines = {line: members for line, members in lines.items() if line.strategy != FULL}
    looks = looks_of(list(lines))
    drawn = Figure(figsize=(7.0, max(3.4, 1.2 + 0.3 * len(lines))), layout="constrained")
    ax = drawn.subplots()
    ax.set_xscale("log")
    drawn_at: list[tuple[str, tuple[float, float]]] = []
    for line, members in lines.items():
        points = sorted((_share(chosen), *_score(chosen)) for chosen in _each_budget(members))
        points = [p for p in points if p[0] > 0 and not math.isnan(p[1])]
        if not points:
            continue
        x, y, e = zip(*points, strict=True)
        named = titled(line.name, members[0])
        drawn_at += [(f"{named} at {share:.3g} %", (share, op)) for share, op, _ in points]
        error = None if any(map(math.isnan, e)) else list(e)
        look: Any = {"markersize": 5, "linewidth": 1.2, "capsize": 2, **looks[line.name]}
        ax.errorbar(x, y, error, label=wrap(named, 34), **look)
    for name, value in (("full fine-tuning", _op_of_full(cells)), ("base model", _base(cells))):
        if not math.isnan(value):
            dashes = "--" if name == "base model" else "-"
            ax.axhline(value, color="#9A9A9A", linewidth=1, linestyle=dashes, label=name, zorder=1)
    log_ticks(ax)
    roomy(ax)
    ax.grid()
    ax.set_xlabel(ALIVE)
    ax.set_ylabel("overall performance (OP), %")
    if hidden := near(ax, drawn_at):
        drawn.supxlabel(textwrap.fill(hidden, 120), fontsize=7, color=GREY)
    drawn.suptitle(wrap(title, 98))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), labelspacing=0.7)
    return drawn


def write(cells: Sequence[Cell], stem: Path) -> list[Path]:
    """The table and the figure of one group that has several budgets."""
    title = f"{cells[0]['scenario']} · {cells[0]['model']}"
    return table(title, cells).write(stem) + save(figure(title, cells), stem)


def _by_label(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    by_label: dict[str, list[Cell]] = {}
    for cell in cells:
        by_label.setdefault(cell["label"], []).append(cell)
    best = {
        label: max((c["metrics"]["op"] or 0.0 for c in members), default=0.0)
        for label, members in by_label.items()
    }
    order = sorted(best, key=lambda name: (PARTS.index(part(by_label[name][0])), -best[name]))
    return {label: by_label[label] for label in order}


def _each_budget(members: Sequence[Cell]) -> list[list[Cell]]:
    by_budget: dict[str, list[Cell]] = {}
    for cell in members:
        by_budget.setdefault(cell["budget"], []).append(cell)
    return list(by_budget.values())


def _size(cells: Sequence[Cell], budget: str) -> int:
    return max(c["budget_bytes"] for c in cells if c["budget"] == budget)


def _op(members: Sequence[Cell], budget: str) -> Estimate:
    return _score([c for c in members if c["budget"] == budget])


def _score(members: Sequence[Cell]) -> Estimate:
    return estimate([100 * number(c["metrics"]["op"]) for c in members])


def _share(members: Sequence[Cell]) -> float:
    return estimate([storage(c) for c in members])[0]


def _show(found: Estimate) -> str:
    return show(found[0], ".1f", found[1])


def _kept(cells: Sequence[Cell], members: Sequence[Cell], budget: str) -> Estimate:
    """Seed by seed, against the full fine-tuning of the same seed."""
    full = {c["seed"]: _gain(c) for c in cells if c["strategy"] == FULL}
    mine = [c for c in members if c["budget"] == budget and full.get(c["seed"])]
    return estimate([100 * _gain(c) / full[c["seed"]] for c in mine])


def _gain(cell: Mapping[str, Any]) -> float:
    return number(cell["metrics"]["op"]) - _start(cell)


def _start(cell: Mapping[str, Any]) -> float:
    return float(np.mean([number(x) for x in cell["matrix"][0]]))


def _base(cells: Sequence[Cell]) -> float:
    return estimate([100 * _start(c) for c in cells])[0]


def _op_of_full(cells: Sequence[Cell]) -> float:
    return _score([c for c in cells if c["strategy"] == FULL])[0]
