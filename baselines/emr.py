"""EMR-Merging: elect a vector for all tasks, mask it and rescale it for each (Huang et al. 2024, arXiv 2405.17461).

u = sign(mean of the tasks' deltas D) * the largest |D_t| of that sign; m_t = D_t has the sign; scale_t = sum |D_t| /
sum |m_t u| over all entries; the base plus scale_t * m_t * u answers for a task. No option, no tuning, no data. As in
harveyhuang18/EMR_Merging a mean of zero counts as negative; there the sums of the scales are of each parameter's mean.
Sign and size follow from all deltas, so each is kept, too, in bf16, without a budget. What answers is made of three
shared artefacts alone: `vector`, bf16 (exact), `masks`, a bit an entry, `task/parameter`, and `scales`, one a task.
"""

from __future__ import annotations

from collections import Counter

import torch

from cl_graft.skillpack.codecs import decode, dense, exact, mask, original
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy import Kept, Strategy
from cl_graft.strategy.context import Context
from cl_graft.task import Task


class emr(Strategy):
    """EMR-Merging: one vector for all tasks, a mask and a scale for each."""

    keeps = "per_task"
    budgeted = False

    def learn(self, task: Task, context: Context) -> Kept:
        own = context.dense(self.fine_tune(task, context))
        deltas = {pack.task: pack.tensors for pack in self.packs} | {task.name: own}
        vector, masks = {}, {}
        # sum |D_t| and sum |m_t u|
        sizes, masked = Counter(), Counter()
        for name in own:
            u = elected([tensors[name] for tensors in deltas.values()])
            vector[name] = dense(u)
            for other, tensors in deltas.items():
                agrees = decode(tensors[name]).mul_(u.sign()) > 0
                masks[f"{other}/{name}"] = mask(agrees)
                sizes[other] += decode(tensors[name]).abs_().sum(dtype=torch.float64).item()
                masked[other] += u.abs().mul_(agrees).sum(dtype=torch.float64).item()
        scales = {t: exact(torch.tensor(sizes[t] / (masked[t] or 1.0))) for t in deltas}
        return Kept(own, {"vector": vector, "masks": masks, "scales": scales})

    # by the recipe alone, so that its stages are those of all methods that train from the base
    learn.pure = True

    def compose(self, task):
        if task is None or task >= len(self.packs):
            return []
        made_of = self.shared["vector"], self.shared["masks"], self.shared["scales"]
        return [compose(rescaled, made_of, made_of[0].shapes, task=self.packs[task].task)]


def elected(encoded):
    """u of a parameter, from its encoded deltas, of which one is decoded at a time."""
    sign = torch.where(sum(map(decode, encoded)) > 0, 1.0, -1.0)
    largest = torch.zeros_like(sign)
    for change in map(decode, encoded):
        torch.maximum(largest, change.mul_(sign), out=largest)
    return largest.mul_(sign)


def rescaled(name, vector, masks, scales, *, task):
    """scale_t * m_t * u of a parameter."""
    scale = original(scales.tensors[task])
    return masks.delta(f"{task}/{name}").mul_(vector.delta(name)).mul_(scale)
