"""What it costs to be told no task: forward passes, over those of one pack that answers alone and is named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from cl_graft import plugins
from cl_graft.task import Task

if TYPE_CHECKING:
    from cl_graft.evaluation.outcomes import Results
    from cl_graft.strategy import Strategy


def overhead(strategy: Strategy, results: Mapping[str, Results]) -> float | None:
    """Forward passes of routing and answering the tasks seen, over those of answering; None where none is inferred.

    Every token of an answer in words takes a pass, its end included, and a choice by likelihood one that reads the
    prompt; in an ensemble each member takes as many. So counts table 6 of GraftLLM (arXiv 2505.18502): 1.03, 2.03 and
    3.03 for the best one, two and three packs, its answers being long.
    """
    router, learned = strategy.router, len(strategy.packs)
    if router is None or not learned:
        return None
    alone = spent = 0
    for task in strategy.scenario.tasks[:learned]:
        groups = strategy.answered[task.name].groups
        members = {i: max(1, len(g.members)) for g in groups for i in g.examples}
        for index, passes in enumerate(_passes(strategy, task, results[task.name])):
            alone += passes
            spent += passes * members[index] + router.passes(learned)
    return spent / alone


def _passes(strategy: Strategy, task: Task, outcomes: Results) -> Sequence[int]:
    """Forward passes of each test example's answer."""
    for scoring in task.scorings:
        if plugins.load("scorer", scoring.name).needs == "answers":
            said = [outcome.answer for outcome in outcomes[scoring.label]]
            rows = strategy.tokenizer(said, add_special_tokens=False)["input_ids"]
            return [len(row) + 1 for row in rows]
    return [1] * len(task.test)
