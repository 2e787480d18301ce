"""Consensus task arithmetic: of the tasks' sum, what two tasks and more use (Wang et al. 2024, arXiv 2405.07813).

t = sum of the tasks' deltas; TALL-masks say which entries of it each task uses, and those that fewer than `least` tasks
use are left out: of none they are "catastrophic", of one alone "selfish". The base plus scale times the rest answers
for every task. As in nik-dim/tall_masks the masks are those that each task's own lambda gives, chosen as for
`tall_mask`, and then the scale among 0.1, 0.2, ..., 1.0 on the validation data of all tasks, here by the loss. There
the vector may be of TIES instead of a sum; here it is task arithmetic's.

The vector, masked and unscaled, is the shared artefact `vector`, bf16, made anew after each task from every task's
delta, which is kept in bf16; the masks are not kept.
"""

from __future__ import annotations

from cl_graft.ranges import Count, NotNegative, Positive
from cl_graft.skillpack.codecs import decode, dense
from cl_graft.strategy import Kept, Strategy
from cl_graft.strategy.choose import composed_scaled, kept_scaled
from cl_graft.strategy.context import Context
from cl_graft.strategy.tall import masked_sum
from cl_graft.task import Task

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class consensus(Strategy):
    """least: so many tasks, of those seen, must use an entry; the paper's 2. 1 leaves out only what none uses.

    mask_lambda: the larger, the fewer entries a task uses; None chooses one for each task. scale: factor on the result;
    None chooses it. Both are chosen anew after each task. One task alone is itself.
    """

    keeps = "merged"
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        least: Count = 2,
        mask_lambda: NotNegative | None = None,
        scale: Positive | None = None,
    ) -> Kept:
        own = context.dense(self.fine_tune(task, context))
        if not self.packs:
            return Kept(own)
        deltas = {pack.task: pack.tensors for pack in self.packs} | {task.name: own}
        total, masks = masked_sum(self, deltas, mask_lambda)
        vector = {n: dense(agreed(n, total, masks, deltas, least)) for n in own}
        return kept_scaled(self, task, own, vector, GRID, scale)

    # by the recipe alone, so that its stages are those of all methods that train from the base
    learn.pure = True

    def compose(self, task):
        return composed_scaled(self)


def agreed(name, total, masks, tasks, least):
    """t of a parameter where at least so many tasks' masks have a one, else 0; all encoded."""
    users = sum(decode(masks[f"{task}/{name}"]) for task in tasks)
    return decode(total[name]).mul_(users >= least)
