"""Several tasks as one corpus, for methods that train on all of them at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cl_graft.task import Task


def union(tasks: Sequence[Task]) -> Task:
    """The last task with the examples and preference pairs of all, and with as many times its steps, of SFT and of DPO.

    Epochs stay as they are, and are longer. It has no pairs where a task has none: what trains it is told its parts.
    """
    last, times = tasks[-1], len(tasks)
    half = last.training.preference
    recipe = replace(
        last.training,
        steps=last.training.steps * times,
        preference=half and replace(half, steps=half.steps * times),
    )
    whole = all(task.pairs for task in tasks)
    return replace(
        last,
        train=[example for task in tasks for example in task.train],
        pairs=[pair for task in tasks for pair in task.pairs] if whole else [],
        training=recipe,
    )
