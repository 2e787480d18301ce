"""TALL-masks: a vector for all tasks, a mask that finds each task's part in it (Wang et al. 2024, arXiv 2405.07813).

t = sum of the tasks' deltas D; m_t = |D_t| > lambda |t - D_t|; the base plus m_t * t answers for a task. As in
nik-dim/tall_masks (src/utils/tallmask_utils.py), lambda is chosen for each task among 0.2, 0.3, ..., 0.6 on its
validation data: here by the loss, for every task seen, anew after each task, since the vector is another one then.
An old task's mask follows from its delta and the newest vector, so each delta is kept, too, in bf16, without a budget.
What answers is made of the two shared artefacts alone: `vector`, bf16, and `masks`, a bit an entry, `task/parameter`.
"""

from __future__ import annotations

from collections.abc import Mapping

from cl_graft.ranges import NotNegative
from cl_graft.skillpack.codecs import decode, dense, mask
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy import Kept, Strategy
from cl_graft.strategy.choose import validation_loss
from cl_graft.strategy.context import Context
from cl_graft.strategy.kept import Tensors
from cl_graft.task import Task

LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)


class tall_mask(Strategy):
    """mask_lambda: the larger, the fewer entries of the vector a task is given; None chooses one for each task."""

    keeps = "per_task"
    budgeted = False

    def learn(
        self, task: Task, context: Context, *, mask_lambda: NotNegative | None = None
    ) -> Kept:
        own = context.dense(self.fine_tune(task, context))
        deltas = {pack.task: pack.tensors for pack in self.packs} | {task.name: own}
        # of one task alone the mask is the same under all
        tried = LAMBDAS if mask_lambda is None and self.packs else (mask_lambda or LAMBDAS[0],)
        vector, masks = shared(deltas, tried)
        chosen = dict.fromkeys(deltas, tried[0])
        if len(tried) > 1:
            self.restore_base()
            chosen = {name: self._best(name, vector, masks) for name in deltas}
            self.grafted.unload()
        keys = [(of, f"{of}/{name}") for of in deltas for name in own]
        return Kept(
            own, {"vector": vector, "masks": {key: masks[chosen[of]][key] for of, key in keys}}
        )

    def _best(self, name: str, vector: Tensors, masks: Mapping[float, Tensors]) -> float:
        """The lambda under which a task loses least on its validation."""
        task = next(t for t in self.scenario.tasks if t.name == name)

        def lost(x: float) -> float:
            made_of = self._pack(task, vector), self._pack(task, masks[x])
            pack = compose(masked, made_of, made_of[0].shapes, task=name)
            return validation_loss(self, [pack], task)

        return min(masks, key=lost)

    # by the recipe alone, so that its stages are those of all methods that train from the base
    learn.pure = True

    def compose(self, task):
        if task is None or task >= len(self.packs):
            return []
        made_of = self.shared["vector"], self.shared["masks"]
        return [compose(masked, made_of, made_of[0].shapes, task=self.packs[task].task)]


def shared(deltas, lambdas):
    """t, {parameter: encoded}, and m_t, {lambda: {task/parameter: encoded}}.

    deltas: {task: {parameter: encoded}}, of which one tensor is decoded at a time.
    """
    vector, masks = {}, {x: {} for x in lambdas}
    for name in next(iter(deltas.values())):
        total = sum(decode(tensors[name]) for tensors in deltas.values())
        for task, tensors in deltas.items():
            for x, bits in parts(decode(tensors[name]), total, lambdas):
                masks[x][f"{task}/{name}"] = bits
        vector[name] = dense(total)
    return vector, masks


def parts(change, total, lambdas):
    """(lambda, m_t of a parameter, encoded); change is written to."""
    rest = (total - change).abs_()
    change.abs_()
    return [(x, mask(change > rest * x)) for x in lambdas]


def masked(name, vector, masks, *, task):
    """m_t * t of a parameter."""
    return masks.delta(f"{task}/{name}").mul_(vector.delta(name))
