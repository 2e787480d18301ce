"""What methods share that train on remembered rows, and with a slow adapter beside the one that is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cl_graft.ranges import Count, Positive, Rest
from cl_graft.skillpack.codecs import Encoded
from cl_graft.strategy.base import Strategy
from cl_graft.strategy.context import Context
from cl_graft.strategy.kept import Kept, Tensors
from cl_graft.strategy.memory import MEMORY, Memory, Reservoir, Surprising
from cl_graft.strategy.surprise import surprise
from cl_graft.task import Task
from cl_graft.training.adapters import Adapter, encoded, faster, require_adaptable, require_dropout
from cl_graft.training.average import average
from cl_graft.training.config import Row, StageConfig
from cl_graft.training.term import Term, followed

FAST = "fast"  # the shared artefact: the adapter that goes on being trained
State = Mapping[str, Any]


class Replaying(Strategy):
    """Trains every stage on its own rows and on remembered ones; `learn` says of how many by `remember`, and keeps
    `foreseen`."""

    keeps = "latest"
    budgeted = False

    def remember(
        self, size: int, share: float, part: type[Reservoir] | type[Surprising] = Reservoir
    ) -> None:
        """Take up the memory of the tasks so far: of `size` rows for each kind of stage; `share` of a stage's rows."""
        kept = self.shared.get(MEMORY)
        self.memory = Memory(size, self.seed, kept.tensors if kept else None, part)
        self.share = share

    def training_rows(self, rows: Sequence[Row], job: StageConfig) -> Sequence[Row]:
        mixed = self.memory.mixed(rows, job, self.share)
        scores: Sequence[float] = ()
        if self.memory.part is Surprising:
            scores = surprise(self.model, self.tokenizer, rows, job.max_length)
        self.memory.see(job.kind, rows, scores)
        return mixed

    def foreseen(self) -> Mapping[str, Tensors]:
        return {MEMORY: self.memory.tensors()}


class Averaged(Replaying):
    """Trains one adapter on from task to task and answers with another, the moving average of its A and B."""

    touches = ("attention", "mlp", "other")
    terms = ("penalty", "follow")

    def check(self, context: Context, **options: Any) -> None:
        require_adaptable(self.model)
        require_dropout(self.model, options["dropout"], f"{type(self).__name__}.dropout")

    def taught(
        self,
        task: Task,
        *,
        decay: float,
        rank: Count,
        alpha_over_rank: Positive,
        dropout: Rest,
        learning_rate_scale: Positive,
        terms: Callable[[State], Sequence[Term]] = lambda slow: (),
    ) -> Kept:
        """What is kept of the task: the slow adapter, which answers, and the fast one and the memory beside it.

        decay: of the average, after every step. terms: others, given A and B of the slow adapter by the parameters'
        names, which they may read at every step. Both adapters start from what they were; of the first task the slow
        one starts as the fast one.
        """
        fast = self.shared.get(FAST)
        self.restore_base()  # the adapters themselves hold what was learned
        with Adapter(self.model, rank, alpha_over_rank, dropout) as adapter:
            if fast:
                adapter.load(self.packs[-1].tensors)
            slow = adapter.trained()
            if fast:
                adapter.load(fast.tensors)
            every = [*terms(slow), Term.follow(average, slow, decay=decay)]
            folder = self.teach(adapter.model, faster(task, learning_rate_scale), every)
            shared = {FAST: _encoded(adapter), **self.foreseen()}
            adapter.train_on(followed(every, folder)[-1].state)
            return Kept(_encoded(adapter), shared)


def _encoded(adapter: Adapter) -> dict[str, Encoded]:
    return {name: encoded(pair) for name, pair in adapter.factors().items()}
