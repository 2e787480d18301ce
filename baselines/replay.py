"""Experience replay: rows of earlier tasks among the new one's (reservoir: Riemer et al. 2019, arXiv 1810.11910)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated

from cl_graft.ranges import Count, Rest, Strength
from cl_graft.strategy import Context, Kept, Strategy
from cl_graft.strategy.kept import Tensors
from cl_graft.strategy.memory import MEMORY, Memory
from cl_graft.task import Task
from cl_graft.training.config import Row, StageConfig


class replay(Strategy):
    """Every stage trains on its own rows and on remembered ones, in as many steps as the recipe has without them.

    The memory is a reservoir (Vitter's algorithm R) of the rows of SFT, and one of the preference pairs of DPO,
    where a recipe has that half; old pairs are the ones that the model of their time sampled, and a task for which
    none are found replays none. Remembered rows are shuffled among the new ones in every pass. The whole delta is
    kept in bf16, as `sequential` does, and the memory's texts beside it.
    """

    keeps = "latest"
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        size: Count = 500,
        share: Annotated[Rest, Strength(0.05, 0.1, 0.2, 0.3, 0.5)] = 0.3,
    ) -> Kept:
        """size: rows of each reservoir; 500 is the middle one of Mammoth's 200, 500 and 5120.

        share: of a stage's rows that are old, to the nearest row, once there are any; a memory with fewer is gone
        through more than once. EasyCL's replay_ratio .3 is a part of each old task's data instead, and TRACE's 10 %
        is, too: both grow with the number of tasks, a share does not.
        """
        kept = self.shared.get(MEMORY)
        self.memory, self.share = Memory(size, self.seed, kept and kept.tensors), share
        tuned = context.dense(self.fine_tune(task, context))
        return Kept(tuned, self.foreseen())

    def training_rows(self, rows: Sequence[Row], job: StageConfig) -> Sequence[Row]:
        count = round(len(rows) * self.share / (1 - self.share))
        old = self.memory[job.kind].draw(count, job.seed)
        self.memory.see(job.kind, rows)
        return [*rows, *old]

    def foreseen(self) -> Mapping[str, Tensors]:
        return {MEMORY: self.memory.tensors()}
