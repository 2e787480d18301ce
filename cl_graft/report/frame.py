"""Results as a pandas DataFrame: a row a cell, or a row an entry of their matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cl_graft.matrix import METRICS
from cl_graft.report import ReportedCell, find
from cl_graft.report.aggregate import KINDS, alive, extra, general, number, packs, storage
from cl_graft.report.divergence import FORWARD, REVERSE, moved
from cl_graft.report.protocols import Cell, protocol

if TYPE_CHECKING:
    import pandas as pd

ABOUT = ("scenario", "strategy", "label", "model", "budget", "seed")
WAYS = (FORWARD, REVERSE)


def results(
    folders: str | Path | Sequence[str | Path] = "results", scores: bool = False
) -> pd.DataFrame:
    """The cells at or below the folders, complete or not, as a pandas DataFrame.

    A row a cell: what it is (`scenario`, `strategy`, `label` with the options set, `model`, `budget`, `seed`),
    `task_ids` (given, inferred by a router, or not needed) and `budgeted`, `complete`, `tasks` in their order, every
    metric by its name, `kl_forward` and `kl_reverse` (KL to the base on each new task's text, both ways, the mean over
    tasks, in nats a token), general ability before (`general_base`) and at the end (`general`), `routing`,
    `bytes_alive`, `largest_pack` and `storage` (per cent of the base, a task), seconds by what they went into
    (`train_s`, ...) and on the clock (`spent_s`), `tokens`, `peak_memory_mb`, and the cell's `folder`.

    scores: a row an entry of a matrix instead: what the cell is, `metric` (score, or another that was recorded),
    `row` (0 is the base model), `learned` (the task learned last, empty for the base), `task`, `score`, `stderr` over
    test examples, `n` of them, and, where the task was just learned, `kl_forward` and `kl_reverse` on its text.

    Scores and metrics are shares of 1; what was not measured is NaN.
    Raises CLGraftError where there is no cell.
    """
    import pandas as pd

    given = [folders] if isinstance(folders, str | Path) else folders
    found = find([Path(folder) for folder in given])
    rows = [row for f in found for row in _entries(f)] if scores else [_row(f) for f in found]
    return pd.DataFrame(rows)


def _about(cell: Cell) -> dict[str, Any]:
    return {name: cell[name] for name in ABOUT} | {
        "task_ids": protocol(cell),
        "budgeted": cell["budgeted"],
        "complete": cell["complete"],
    }


def _row(reported: ReportedCell) -> dict[str, Any]:
    cell = reported.cell
    ability, seconds = general(cell), cell.get("seconds") or {}
    routing = [math.nan, *map(number, cell.get("routing_accuracy") or [])]
    return {
        **_about(cell),
        "tasks": " → ".join(cell["tasks"]),
        **{name: number(cell["metrics"].get(name)) for name in METRICS},
        **{f"kl_{way}": float(moved(cell, way).mean()) for way in WAYS},
        "general_base": float(ability[0]),
        "general": float(ability[-1]),
        "routing": routing[-1],
        "bytes_alive": [math.nan, *alive(cell)][-1],
        "largest_pack": max(packs(cell), default=math.nan),
        "storage": storage(cell),
        **{f"{kind}_s": number(seconds.get(kind)) for kind in KINDS},
        "spent_s": number(cell.get("spent")),
        "tokens": number(cell.get("tokens")),
        "peak_memory_mb": number(cell.get("peak_memory_mb")),
        "folder": str(reported.path),
    }


def _entries(reported: ReportedCell) -> Iterator[dict[str, Any]]:
    cell = reported.cell
    tasks, nothing = cell["tasks"], [[None] * len(cell["tasks"])] * len(cell["matrix"])
    kl = {way: moved(cell, way).tolist() for way in WAYS}
    whole = (cell["matrix"], cell["stderr"] or nothing, cell["n"] or nothing)
    others = {m: (extra(cell, m), nothing, nothing) for m in cell.get("extra_matrices") or {}}
    for metric, (values, errors, counts) in {"score": whole, **others}.items():
        for i, learned in enumerate(["", *tasks]):
            for j, task in enumerate(tasks):
                yield {
                    **_about(cell),
                    "metric": metric,
                    "row": i,
                    "learned": learned,
                    "task": task,
                    "score": number(values[i][j]),
                    "stderr": number(errors[i][j]),
                    "n": number(counts[i][j]),
                    **{f"kl_{w}": kl[w][j] if i == j + 1 else math.nan for w in WAYS},
                }
