"""TALL-masks: a vector for all tasks, a mask that finds each task's part in it (Wang et al. 2024, arXiv 2405.07813).

t = sum of the tasks' deltas D; m_t = |D_t| > lambda |t - D_t|; the base plus m_t * t answers for a task. As in
nik-dim/tall_masks (src/utils/tallmask_utils.py), where lambda is chosen a task among 0.2 to 0.6 on validation data.
An old task's mask follows from its delta and the newest vector, so each delta is kept, too, in bf16, without a budget.
What answers is made of the two shared artefacts alone: `vector`, bf16, and `masks`, a bit an entry, `task/parameter`.
"""

from __future__ import annotations

from cl_graft.ranges import NotNegative
from cl_graft.skillpack.codecs import decode, dense, mask
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy import Kept, Strategy
from cl_graft.strategy.context import Context
from cl_graft.task import Task


class tall_mask(Strategy):
    """mask_lambda: the larger, the fewer entries of the vector a task is given; one for all tasks."""

    keeps = "per_task"
    budgeted = False

    def learn(self, task: Task, context: Context, *, mask_lambda: NotNegative = 0.4) -> Kept:
        own = context.dense(self.fine_tune(task, context))
        deltas = {pack.task: pack.tensors for pack in self.packs} | {task.name: own}
        vector, masks = {}, {}
        for name in own:
            of_tasks = {task: tensors[name] for task, tensors in deltas.items()}
            vector[name], masks_of = shared(of_tasks, mask_lambda)
            masks |= {f"{task}/{name}": bits for task, bits in masks_of.items()}
        return Kept(own, {"vector": vector, "masks": masks})

    # by the recipe alone, so that its stages are those of all methods that train from the base
    learn.pure = True

    def compose(self, task):
        if task is None or task >= len(self.packs):
            return []
        made_of = self.shared["vector"], self.shared["masks"]
        return [compose(masked, made_of, made_of[0].shapes, task=self.packs[task].task)]


def shared(of_tasks, mask_lambda):
    """t of a parameter, and m_t of each task; of_tasks: {task: encoded delta}, of which one is decoded at a time."""
    total = sum(map(decode, of_tasks.values()))

    def part(change):
        rest = (total - change).abs_().mul_(mask_lambda)
        return mask(change.abs_() > rest)

    return dense(total), {task: part(decode(encoded)) for task, encoded in of_tasks.items()}


def masked(name, vector, masks, *, task):
    """m_t * t of a parameter."""
    return masks.delta(f"{task}/{name}").mul_(vector.delta(name))
