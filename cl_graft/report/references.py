"""Intransigence of the cells of a report: how much worse a task is learned than by a reference that is in it, too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cl_graft.matrix import PerformanceMatrix
from cl_graft.report.protocols import Cell

REFERENCES = ("joint", "individual")  # the first of them that is there


def with_references(cells: Sequence[Cell]) -> list[Cell]:
    """The cells; complete ones with `intransigence` among their metrics and the reference's name in `intransigence_of`.

    The reference is `joint`, else `individual`, of the same scenario, data, order of tasks, weights of the base and
    seed, at whatever budget, as it has none: its scores of each task when that was just learned (Chaudhry et al. 2018).
    Seeds without a cell of the reference that other seeds have are unmeasured.
    """
    known: dict[tuple[Any, ...], dict[str, dict[int, list[float]]]] = {}
    for cell in cells:
        if cell["complete"] and cell["strategy"] in REFERENCES:
            scores = PerformanceMatrix(cell["matrix"], cell["tasks"]).learned()
            of = known.setdefault(_experiment(cell), {}).setdefault(cell["strategy"], {})
            of.setdefault(cell["seed"], scores)
    return [_referred(cell, known.get(_experiment(cell), {})) for cell in cells]


def _referred(cell: Cell, known: dict[str, dict[int, list[float]]]) -> Cell:
    name = next((name for name in REFERENCES if name in known), None)
    if name is None or not cell["complete"]:
        return cell
    reference, value = known[name].get(cell["seed"]), math.nan
    if reference is not None:
        value = PerformanceMatrix(cell["matrix"], cell["tasks"]).intransigence(reference)
    measured = None if math.isnan(value) else value
    return {
        **cell,
        "metrics": {**cell["metrics"], "intransigence": measured},
        "intransigence_of": name,
    }


def _experiment(cell: Cell) -> tuple[Any, ...]:
    """What cells share whatever their strategy, budget and seed; of `data` each seed has its own."""
    trained_on = str(cell.get("config", {}).get("train_on"))
    return cell["scenario"], cell["model"], cell.get("base"), trained_on, tuple(cell["tasks"])
