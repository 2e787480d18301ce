"""General ability, by what answers a prompt of no task: measured, written down, and given back.

What answers has a name: a task's, whose pack is on, or none where no task is named: the base before any learning, the
one model of a method that answers all prompts alike, or what a router chooses. A method that is told the task has no
answer of its own to a prompt of none; after its first task it is measured with each of its packs on, alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from cl_graft.evaluation.outcomes import Results
    from cl_graft.strategy import Strategy
    from cl_graft.task import Task


class Measured(NamedTuple):
    """Outcomes, the packs that they were made by, and the task that each example was taken for, if any."""

    outcomes: Results
    active: list[str]
    taken_for: list[str | None]


def measure(strategy: Strategy) -> dict[str, Measured]:
    """{what answers: its outcomes}; nothing where the scenario has no general task.

    A pack whose weights were measured before is not measured again.
    """
    from cl_graft.evaluation.examiner import Group, key

    general, found = strategy.scenario.general, dict[str, Measured]()
    if general is None:
        return found
    strategy.answered.pop(general.name, None)
    own = {n: pack for n, pack in enumerate(strategy.packs) if n not in strategy.unlearned}
    own = own if strategy.keeps == "per_task" else {}
    if strategy.router is not None or not own:
        outcomes = strategy.measure(general, None)
        answered = strategy.answered[general.name]
        found[""] = Measured(outcomes, list(answered.key), answered.names)
    for number, pack in own.items():
        group = Group(strategy.compose(number), range(len(general.test)), number)
        outcomes = strategy.examiner.measure(general, [group], len(strategy.packs))
        active, taken = list(key(general, [group])[1:]), [pack.task] * len(general.test)
        found[pack.task] = Measured(outcomes, active, list(taken))
    strategy.grafted.unload()
    return found


def line(general: Task, who: str) -> str:
    """What the lines of outcomes call the general task as this answers it."""
    return f"general:{general.name}" + (f" with {who}" if who else "")


def remembered(
    general: Task | None, record: Mapping[str, Any], outcomes: Mapping[str, Results]
) -> dict[tuple[str, ...], Results]:
    """{the examiner's key: outcomes} of a whole experience, from the lines of its outcomes."""
    if general is None:
        return {}
    active = record["general_active"]
    return {(general.name, *packs): outcomes[line(general, who)] for who, packs in active.items()}
