"""Twin-Merging: what tasks share, and of each the low-rank rest, put together when asked (arXiv 2406.15479).

Lu et al. 2024: shared = scale * sum of the tasks' deltas D, as task arithmetic; v_t = the best approximation of D_t -
shared of a rank; the base plus shared + v_t answers for a task. As in LZY-the-boys/Twin-Merging the scale is 0.3, and
vectors are left whole; its rank is a tenth of all, or 8 on LoRA, where it cuts each factor by itself. There a router
weighs the tasks for each sample, shared + sum w_t v_t, and the w_t sum to one: so what answers for the tasks here,
weighed by w and added up, is just that.

What answers is made of two shared artefacts alone, made anew after each task: `vector`, bf16, and `private`, low-rank
factors in bf16, `task/parameter`. A private part follows from all deltas, so each is kept, too, in bf16. Of all this
only a private part is held to a task's budget.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from cl_graft.ranges import Count, Positive, Strength
from cl_graft.skillpack.codecs import decode, dense
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy import Kept, Strategy
from cl_graft.strategy.context import Context
from cl_graft.strategy.low_rank import largest_rank, truncated
from cl_graft.task import Task


class twin_merging(Strategy):
    """scale: factor on the sum of the deltas. rank: of the private part of every matrix; None takes the largest whose
    private part the budget of a task holds. One task alone is itself.
    """

    keeps = "per_task"
    budgeted = False

    def check(self, context, **options):
        self._rank(context, options["rank"])

    def _rank(self, context: Context, rank: int | None) -> int:
        # the whole budget of a task: what it shares and the deltas have none
        return largest_rank(replace(context, budget=self.budget), rank, "twin_merging.rank")

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        scale: Annotated[Positive, Strength(0.1, 0.2, 0.3, 0.5, 1.0)] = 0.3,
        rank: Count | None = None,
    ) -> Kept:
        own = context.dense(self.fine_tune(task, context))
        if not self.packs:
            return Kept(own)
        rank = self._rank(context, rank)
        deltas = {pack.task: pack.tensors for pack in self.packs} | {task.name: own}
        vector, private = {}, {}
        for name in own:
            vector[name] = dense(sum(decode(tensors[name]) for tensors in deltas.values()) * scale)
            for of, tensors in deltas.items():
                rest = decode(tensors[name]).sub_(decode(vector[name]))
                private[f"{of}/{name}"] = truncated(rest, rank)
        return Kept(own, {"vector": vector, "private": private})

    # by the recipe alone, so that its stages are those of all methods that train from the base
    learn.pure = True

    def compose(self, task):
        if task is None or task >= len(self.packs):
            return []
        if len(self.packs) < 2:
            return self.packs
        made_of = self.shared["vector"], self.shared["private"]
        return [compose(both, made_of, made_of[0].shapes, task=self.packs[task].task)]


def both(name, vector, private, *, task):
    """shared + v_t of a parameter."""
    return vector.delta(name).add_(private.delta(f"{task}/{name}"))
