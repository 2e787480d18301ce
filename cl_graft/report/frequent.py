"""What always giving a task's most frequent reference answer scores, where an answer is right or wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

from cl_graft.data.survey import most_frequent
from cl_graft.store.prompts import recall

Cell = Mapping[str, Any]


def with_frequent(cells: Mapping[Path, Cell]) -> list[Cell]:
    """The results of these folders with `frequent`, {task: share of its test's most frequent reference answer}.

    A task of whose answers no two are alike is not in it.
    """

    @cache
    def shares(out: Path, data: str) -> dict[str, float]:
        found = {}
        for task, asked in recall(out, data).items():
            _, most = most_frequent(Counter(each.reference.strip() for each in asked))
            if most > 1:
                found[task] = most / len(asked)
        return found

    return [
        {**cell, "frequent": shares(path.parent, cell.get("data", ""))}
        for path, cell in cells.items()
    ]


def frequent_note(cells: Sequence[Cell]) -> str:
    """A sentence on the tasks of a group of cells, in per cent, means over their data; empty where there is none."""
    told = {
        cell.get("data", str(number)): cell.get("frequent") or {}
        for number, cell in enumerate(cells)
    }
    shares = {
        task: [found[task] for found in told.values() if task in found]
        for task in cells[0]["tasks"]
    }
    each = [f"{task} {100 * mean(those):.1f}" for task, those in shares.items() if those]
    return f" Always the most frequent answer of the test: {', '.join(each)}." if each else ""
