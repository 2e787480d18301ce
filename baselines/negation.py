"""Negation: the vector of what must go is taken off the model (Ilharco et al. 2023, arXiv 2212.04089)."""

from __future__ import annotations

from dataclasses import replace

from cl_graft.ranges import Positive
from cl_graft.skillpack.codecs import Encoded, decode, dense
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy import Context, Strategy
from cl_graft.strategy.choose import scaled, validation_loss
from cl_graft.strategy.kept import Tensors
from cl_graft.task import Task

GRID = tuple(round(0.1 * n, 1) for n in range(20, 0, -1))
ALLOWED = 1.05


class negation(Strategy):
    """Tasks are learned as by `sequential`; of one that must go the model W becomes W - scale * D, where D is what
    tuning the base changes, on the rows to forget, by the recipe of the task that taught them.

    scale: None takes the largest of 2.0, 1.9, ..., 0.1 under which the validation loss of every other task seen is at
    most 1.05 times what it was (the paper keeps 95 % of a control task's accuracy), else the least.
    """

    keeps = "latest"
    budgeted = False

    def learn(
        self, task: Task, context: Context, *, scale: Positive | None = None
    ) -> dict[str, Encoded]:
        return context.dense(self.fine_tune(task, context))

    def unlearn(self, task: Task, context: Context, *, scale: float | None) -> dict[str, Encoded]:
        now = self.packs[-1]
        recipe = next(t.training for t in self.scenario.tasks if t.name == task.unlearns)
        self.restore_base()
        vector = context.dense(self.fine_tune(replace(task, training=recipe), context))
        chosen = scale or self._largest(task, vector)
        return {n: dense(now.delta(n) - chosen * decode(vector[n])) for n in vector}

    def _largest(self, task: Task, vector: Tensors) -> float:
        """The scale where nobody gave one."""
        self.restore_base()
        now, pack = self.packs[-1], self._pack(task, vector)
        seen = self.scenario.tasks[: len(self.packs)]
        others = [other for other in seen if other.name != task.unlearns and not other.unlearns]

        def lost(scale: float) -> list[float]:
            off = compose(scaled, [pack], pack.shapes, scale=-scale)
            return [validation_loss(self, [now, off], other) for other in others]

        most = [ALLOWED * loss for loss in lost(0.0)]
        fits = (x for x in GRID if all(a <= b for a, b in zip(lost(x), most, strict=True)))
        chosen = next(fits, GRID[-1])
        self.grafted.unload()
        return chosen

    # by the recipe alone, so that its stages are those of all methods that train so
    learn.pure = True
