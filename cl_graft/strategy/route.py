"""Which packs answer a prompt where nobody says its task: what a router is given, keeps, and chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cl_graft.errors import OverBudget
from cl_graft.evaluation.examiner import Group
from cl_graft.routing.base import BaseRouter, Choice, Router, State, View
from cl_graft.skillpack.codecs.exact import exact, original
from cl_graft.skillpack.live.composed import blend
from cl_graft.strategy.context import Context
from cl_graft.strategy.kept import ROUTER, Tensors
from cl_graft.task import Task

if TYPE_CHECKING:
    from cl_graft.strategy.base import Strategy

ROWS = 128  # of features that stand for a task's, where only the size of a state is asked for


def learned(strategy: Strategy, router: BaseRouter, task: Task) -> Tensors:
    """The router's state after the task, of which the training prompts alone are looked at."""
    prompts = router.sample([e.prompt for e in task.train], strategy.seed)
    state = router.learn(_state(strategy), prompts, _view(strategy), len(strategy.packs))
    return {name: exact(value) for name, value in state.items()}


def choices(strategy: Strategy, router: BaseRouter, prompts: Sequence[str]) -> list[Choice]:
    """What answers each prompt, as the router's selection has it."""
    scores = router.judge(_state(strategy), prompts, _view(strategy))
    return router.selection.choose(scores, router.temperature, threshold(strategy, router))


def threshold(strategy: Strategy, router: BaseRouter) -> float | None:
    """The best score below which the base answers; None where it never does.

    The quantile `reject` of the best scores of the tasks' validation prompts, on which nothing has learned
    (Task.with_validation), of all tasks so far.
    """
    if not router.selection.reject:
        return None
    seen = strategy.scenario.tasks[: len(strategy.packs)]
    prompts = [e.prompt for task in seen for e in task.validation or task.train]
    state = _state(strategy)
    told = strategy.shared[ROUTER].digest if state else "", len(strategy.packs)
    if strategy.thresholds.get("of") != told:
        scores = router.judge(state, prompts, _view(strategy))
        strategy.thresholds = {"of": told, "at": router.selection.threshold(scores)}
    return strategy.thresholds["at"]


def group(strategy: Strategy, choice: Choice, examples: Sequence[int]) -> Group:
    """Who answers examples of this choice: the packs of one task, an ensemble of several tasks' packs, or a merge."""
    first = choice.tasks[0] if choice.tasks else None
    if len(choice.tasks) < 2:
        return Group(strategy.compose(first), examples, first)
    members = [strategy.compose(task) for task in choice.tasks]
    assert strategy.router
    if strategy.router.selection.combine == "ensemble":
        return Group((), examples, first, members, of_one=False)
    return Group([blend(members, choice.weights)], examples, first, of_one=False)


def require_fit(context: Context, router: BaseRouter) -> None:
    """Raises OverBudget where the router's state after one task takes all that the first task may keep."""
    if not isinstance(router, Router):
        return
    width = context.model.config.get_text_config().hidden_size
    rows = torch.randn(ROWS, width, generator=torch.Generator().manual_seed(0))
    tensors = {name: exact(value) for name, value in router.update({}, rows, 0).items()}
    name, cost = type(router).__name__, context.cost(tensors)
    if cost >= context.budget.bytes:
        raise OverBudget(
            f"the router {name!r} keeps {cost} bytes after the first task, and the budget {context.budget.text} allows "
            f"{context.budget.bytes} for it and the task's pack together; raise --budget, or choose a smaller --router "
            "(centroids keeps least)."
        )


def _state(strategy: Strategy) -> State:
    kept = strategy.shared.get(ROUTER)
    return {name: original(encoded) for name, encoded in kept.tensors.items()} if kept else {}


def _view(strategy: Strategy) -> View:
    """The base, with no pack on, and what answers each task so far."""
    strategy.grafted.unload()
    packs = [strategy.compose(task) for task in range(len(strategy.packs))]
    return View(strategy.grafted, strategy.tokenizer, strategy.features, packs)
