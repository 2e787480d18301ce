"""The bytes of what a method keeps, held against its budget: packs of its tasks, and what these share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod

import torch

from cl_graft.budget import Budget
from cl_graft.errors import OverBudget
from cl_graft.skillpack.codecs.sparse import sparse
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.strategy.context import Context, cost_of

Shared = Mapping[str, SkillPack]


def alive(packs: Sequence[SkillPack], shared: Shared, newest: bool) -> list[SkillPack]:
    """The packs that are still needed, all tasks' or the newest alone, and those that tasks share."""
    own = packs[-1:] if newest else packs
    return [*own, *shared.values()]


def spoken_for(packs: Sequence[SkillPack], shared: Shared, newest: bool, budget: Budget) -> int:
    """Bytes of the next task's budget that shared artefacts take: all that are alive, over the budgets so far."""
    before = 0 if newest else _cost(packs, budget)
    return max(0, before + _cost(shared.values(), budget) - budget.bytes * len(packs))


def require_fit(packs: Sequence[SkillPack], shared: Shared, newest: bool, budget: Budget) -> None:
    """Raises OverBudget where what is alive takes more than the budgets of the tasks seen."""
    used, allowed = _cost(alive(packs, shared, newest), budget), budget.bytes * len(packs)
    if used > allowed:
        raise OverBudget(
            f"after task {packs[-1].task!r} {used} bytes are kept ({_cost(shared.values(), budget)} of them shared by "
            f"tasks) and {len(packs)} budgets of {budget.text} allow {allowed}; raise --budget or keep less."
        )


def require_one_weight(context: Context) -> None:
    """Raises OverBudget where not even one weight of the base and a pack's header fit."""
    name, shape = min(context.shapes.items(), key=lambda item: prod(item[1]))
    first = torch.arange(prod(shape)).view(shape) == 0
    budget = context.budget
    if context.cost({name: sparse(first.float(), first)}) > budget.bytes:
        raise OverBudget(
            f"the budget {budget.text} ({budget.bytes} bytes) does not hold one weight and a pack's header; raise it."
        )


def _cost(packs: Iterable[SkillPack], budget: Budget) -> int:
    specs = ((pack, {n: e.spec for n, e in pack.tensors.items()}) for pack in packs)
    return sum(cost_of(pack, its, budget) for pack, its in specs)
