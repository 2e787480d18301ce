"""TALL-masks: a vector for all tasks, a mask that finds each task's part in it (Wang et al. 2024, arXiv 2405.07813).

t = sum of the tasks' deltas D; m_t = |D_t| > lambda |t - D_t|; the base plus m_t * t answers for a task
(cl_graft/strategy/tall.py). Where lambda is chosen, it is for every task seen, anew after each task, since the vector
is another one then. An old task's mask follows from its delta and the newest vector, so each delta is kept, too, in
bf16, without a budget. What answers is made of the two shared artefacts alone: `vector`, bf16, and `masks`, a bit an
entry, `task/parameter`.
"""

from __future__ import annotations

from cl_graft.ranges import NotNegative
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy import Kept, Strategy
from cl_graft.strategy.context import Context
from cl_graft.strategy.tall import masked, masked_sum
from cl_graft.task import Task


class tall_mask(Strategy):
    """mask_lambda: the larger, the fewer entries of the vector a task is given; None chooses one for each task among
    0.2, 0.3, ..., 0.6 by the loss on its validation data."""

    keeps = "per_task"
    budgeted = False

    def learn(
        self, task: Task, context: Context, *, mask_lambda: NotNegative | None = None
    ) -> Kept:
        own = context.dense(self.fine_tune(task, context))
        deltas = {pack.task: pack.tensors for pack in self.packs} | {task.name: own}
        vector, masks = masked_sum(self, deltas, mask_lambda)
        return Kept(own, {"vector": vector, "masks": masks})

    # by the recipe alone, so that its stages are those of all methods that train from the base
    learn.pure = True

    def compose(self, task):
        if task is None or task >= len(self.packs):
            return []
        made_of = self.shared["vector"], self.shared["masks"]
        return [compose(masked, made_of, made_of[0].shapes, task=self.packs[task].task)]
