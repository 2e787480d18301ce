"""What a scenario's examples hold, checked before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from cl_graft.errors import CLGraftError
from cl_graft.task import Example, Pair, Scenario, Task


def check_texts(scenario: Scenario) -> None:
    """Raises CLGraftError naming task, example and field for what is no text where text is expected, and for a task
    whose preference pairs all have the same answers."""
    for task in scenario.examined:
        _all(task, "training example", task.train, Example)
        _all(task, "validation example", task.validation, Example)
        _all(task, "test example", task.test, Example)
        _all(task, "preference pair", task.pairs, Pair)
        if task.pairs and all(pair.chosen == pair.rejected for pair in task.pairs):
            raise CLGraftError(
                f"each of the {len(task.pairs)} preference pairs of task {task.name!r} has the same text as chosen and "
                f"rejected ({task.pairs[0].chosen[:60]!r} in pair 1); give pairs that differ, or train without DPO."
            )


def _all(task: Task, what: str, items: Sequence[Any], kind: type[Example | Pair]) -> None:
    words = [f.name for f in fields(kind) if f.type in (str, "str")]
    for number, item in enumerate(items, 1):
        if not isinstance(item, kind):
            raise CLGraftError(
                f"{what} {number} of task {task.name!r} is {type(item).__name__}; make it a "
                f"cl_graft.task.{kind.__name__}."
            )
        for name in words:
            if not isinstance(value := getattr(item, name), str):
                raise CLGraftError(
                    f"{what} {number} of task {task.name!r} has {type(value).__name__} in {name!r}; write text there."
                )
