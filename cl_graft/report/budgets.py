"""One strategy at several budgets: what is kept of full fine-tuning's gain, and for how many bytes.

The shape of the paper's figures 7 and 8 (arXiv 2505.18502): score against storage, a line a strategy, with the base
model and full fine-tuning as the two levels between which all of them lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..matrix import mean_stderr
from .series import Cell, Estimate
from .style import save, styled
from .table import Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FULL = "individual"  # the reference: each task's own full fine-tuning


def groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Complete cells of each scenario and model that were run at two budgets or more."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        if cell["complete"]:
            found.setdefault(f"{cell['scenario']} · {cell['model']}", []).append(cell)
    return {t: members for t, members in found.items() if len({c["budget"] for c in members}) > 1}


def table(title: str, cells: Sequence[Cell]) -> Table:
    """OP and the share of full fine-tuning's gain by budget, with errors over seeds."""
    by_label = _by_label(cells)
    budgets = sorted({c["budget"] for c in cells}, key=lambda b: _size(cells, b))
    rows = []
    for label, members in by_label.items():
        row = [label]
        for budget in budgets:
            row += [_show(_op(members, budget), ".1f"), _show(_kept(cells, members, budget), ".0f")]
        rows.append(tuple(row))
    columns = ["Strategy"]
    for budget in budgets:
        columns += [f"OP at {budget}", f"kept at {budget}"]
    note = (
        "OP: mean final score in per cent. Kept: per cent of the gain of full fine-tuning (individual) over the base "
        "model, seed by seed. ± is the standard error over seeds."
    )
    return Table(f"{title}: by budget", tuple(columns), tuple(rows), note)


@styled
def figure(title: str, cells: Sequence[Cell]) -> Figure:
    """OP against the bytes of the largest pack, in per cent of the base model."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    ax = drawn.subplots()
    for label, members in _by_label(cells).items():
        if members[0]["strategy"] == FULL:
            continue
        points = sorted(
            (
                100 * _mean([max(c["pack_bytes"]) / c["base_bytes"] for c in chosen])[0],
                *_score(chosen),
            )
            for chosen in _each_budget(members)
        )
        x, y, e = zip(*points, strict=True)
        error = None if any(map(math.isnan, e)) else list(e)
        ax.errorbar(x, y, error, marker="o", markersize=4, capsize=2, label=label)
    for name, value in (("base", _base(cells)), ("full fine-tuning", _op_of_full(cells))):
        if not math.isnan(value):
            ax.axhline(value, color="0.5", linewidth=1, linestyle="--" if name == "base" else "-")
            ax.annotate(
                name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom"
            )
    ax.set_xscale("log")
    ax.set_xlabel("largest pack, per cent of the base model's bytes in bf16")
    ax.set_ylabel("OP, per cent")
    ax.set_title(title, fontsize=9)
    ax.legend(fontsize=8)
    return drawn


def write(cells: Sequence[Cell], stem: Path) -> list[Path]:
    """The table and the figure of one group that has several budgets."""
    title = f"{cells[0]['scenario']} · {cells[0]['model']}"
    return table(title, cells).write(stem) + save(figure(title, cells), stem)


def _by_label(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        found.setdefault(cell["label"], []).append(cell)
    best = {label: max(c["metrics"]["op"] for c in members) for label, members in found.items()}
    return {label: found[label] for label in sorted(found, key=lambda name: -best[name])}


def _each_budget(members: Sequence[Cell]) -> list[list[Cell]]:
    found: dict[str, list[Cell]] = {}
    for cell in members:
        found.setdefault(cell["budget"], []).append(cell)
    return list(found.values())


def _size(cells: Sequence[Cell], budget: str) -> int:
    return max(c["budget_bytes"] for c in cells if c["budget"] == budget)


def _op(members: Sequence[Cell], budget: str) -> Estimate:
    return _score([c for c in members if c["budget"] == budget])


def _score(members: Sequence[Cell]) -> Estimate:
    return _mean([100 * c["metrics"]["op"] for c in members])


def _kept(cells: Sequence[Cell], members: Sequence[Cell], budget: str) -> Estimate:
    """Seed by seed, against the full fine-tuning of the same seed."""
    full = {c["seed"]: _gain(c) for c in cells if c["strategy"] == FULL}
    mine = [c for c in members if c["budget"] == budget and full.get(c["seed"])]
    return _mean([100 * _gain(c) / full[c["seed"]] for c in mine])


def _gain(cell: Mapping[str, Any]) -> float:
    return cell["metrics"]["op"] - float(np.mean(cell["matrix"][0]))


def _base(cells: Sequence[Cell]) -> float:
    return _mean([100 * float(np.mean(c["matrix"][0])) for c in cells])[0]


def _op_of_full(cells: Sequence[Cell]) -> float:
    return _score([c for c in cells if c["strategy"] == FULL])[0]


def _mean(values: Sequence[float]) -> Estimate:
    if not values:
        return math.nan, math.nan
    return float(np.mean(values)), mean_stderr(list(values))


def _show(found: Estimate, spec: str) -> str:
    mean, error = found
    if math.isnan(mean):
        return "–"
    return format(mean, spec) + ("" if math.isnan(error) else f" ± {format(error, '.1f')}")
