"""MagMax: of each entry the task's value of largest magnitude, after sequential fine-tuning (arXiv 2407.06322).

Marczak et al. 2024: with D_t = the weights after task t minus the base, the base plus scale * D_k answers, where k is,
of each entry by itself, the task of the largest |D_t|; of equals the later one, as in danielm1405/magmax
(src/merging/task_vectors.py). `sequential`, the method: training goes on from the last task's weights, never from the
merged ones, and D_t is what all tasks so far changed. So the newest delta and `vector`, the largest values so far, are
all that is kept, both in bf16, however many tasks there are. `independent`, which the paper compares: every task is
trained from the base, and each delta is kept.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch

from cl_graft.ranges import Positive, Strength
from cl_graft.skillpack.codecs import decode, dense
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy import Kept, Strategy
from cl_graft.strategy.context import Context
from cl_graft.task import Task


class magmax(Strategy):
    """convention: sequential trains from the last task's weights, independent from the base.

    scale: factor on the merged delta, the released code's 0.5 for every benchmark. One task alone is itself.
    """

    keeps = {"sequential": "latest", "independent": "merged"}
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        convention: Literal["sequential", "independent"] = "sequential",
        scale: Annotated[Positive, Strength(0.2, 0.35, 0.5, 0.7, 1.0)] = 0.5,
    ) -> Kept:
        own = context.dense(self.fine_tune(task, context))
        if self.keeps == "merged":
            return Kept(own)
        old = self.shared["vector"].tensors if self.packs else own
        vector = {n: dense(largest([decode(old[n]), decode(own[n])])) for n in own}
        return Kept(own, {"vector": vector})

    # by the recipe alone, so that its stages are those of all methods that train from the same weights
    learn.pure = True

    def before_learning(self):
        """The newest weights themselves, not what answers."""
        return self.packs[-1:] if self.keeps == "latest" else []

    def compose(self, task):
        if len(self.packs) < 2:
            return self.packs
        made_of = [self.shared["vector"]] if self.keeps == "latest" else self.packs
        shapes, scale = self.packs[-1].shapes, self.options["scale"]
        return [compose(merged, made_of, shapes, scale=scale)]


def merged(name, *packs, scale):
    """The largest of a parameter, scaled."""
    return largest(pack.delta(name) for pack in packs).mul_(scale)


def largest(deltas):
    """float32, of one shape: of each entry the value of largest magnitude, of equals the last one."""
    first, *others = deltas
    for x in others:
        first = torch.where(x.abs() >= first.abs(), x, first)
    return first
