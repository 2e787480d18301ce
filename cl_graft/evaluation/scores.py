"""Scores of tasks from outcomes of test examples: value, number of examples and standard error."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cl_graft.evaluation.win_rate import at_equal_length
from cl_graft.matrix import mean_stderr

if TYPE_CHECKING:
    from cl_graft.evaluation.scorers import Scored
    from cl_graft.task import Task

Cell = dict[str, Any]  # value, n, stderr (None for fewer than two examples of a suite)


def by_metric(
    results: Mapping[str, Mapping[str, Sequence[Scored]]], tasks: Iterable[Task]
) -> dict[str, dict[str, Cell]]:
    """{metric: {task: cell}} of {task: {metric: outcomes, one a test example}}. Raises ValueError as `cells` does."""
    by_name: dict[str, dict[str, Cell]] = {}
    suites = {task.name: task.suites for task in tasks}
    for name, metrics in results.items():
        for key, cell in cells(metrics, suites[name]).items():
            by_name.setdefault(key, {})[name] = cell
    return by_name


def cells(metrics: Mapping[str, Sequence[Scored]], suites: Sequence[str]) -> dict[str, Cell]:
    """{metric: cell} of one task: the first metric is called `score`, the further ones by their own names.

    suites: the suite of each example. A task of several is scored by the mean of their means; what each came to by
    the first metric is there under the suite's name, too. What a judge preferred has a column more, the win rate at
    equal length. Raises ValueError for other than one outcome an example.
    """
    by_column: dict[str, Cell] = {}
    for number, (metric, outcomes) in enumerate(metrics.items()):
        groups: dict[str, list[float]] = {}
        for suite, outcome in zip(suites, outcomes, strict=True):
            groups.setdefault(suite, []).append(outcome.score)
        parts = {suite: _cell(scores) for suite, scores in groups.items()}
        by_column[metric if number else "score"] = _mean_of(list(parts.values()))
        if not number and len(parts) > 1:
            by_column |= parts
        if (controlled := at_equal_length(outcomes)) is not None:
            told = {"value": controlled, "n": len(outcomes), "stderr": None}
            by_column[f"{metric} at equal length"] = told
    return by_column


def _cell(scores: Sequence[float]) -> Cell:
    spread = mean_stderr(scores)
    return {
        "value": sum(scores) / len(scores),
        "n": len(scores),
        "stderr": None if math.isnan(spread) else spread,
    }


def _mean_of(parts: Sequence[Cell]) -> Cell:
    """The mean of k independent means: its variance is the sum of theirs over k squared."""
    if len(parts) == 1:
        return parts[0]
    errors = [part["stderr"] for part in parts]
    return {
        "value": sum(part["value"] for part in parts) / len(parts),
        "n": sum(part["n"] for part in parts),
        "stderr": None if None in errors else math.hypot(*errors) / len(parts),
    }
