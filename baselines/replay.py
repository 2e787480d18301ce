"""Experience replay: rows of earlier tasks among the new one's (reservoir: Riemer et al. 2019, arXiv 1810.11910)."""

from __future__ import annotations

from typing import Annotated, Literal

from cl_graft.ranges import Count, Rest, Strength
from cl_graft.strategy import Context, Kept
from cl_graft.strategy.memory import Reservoir, Surprising
from cl_graft.strategy.replaying import Replaying
from cl_graft.task import Task


class replay(Replaying):
    """Every stage trains on its own rows and on remembered ones, in as many steps as the recipe has without them.

    The memory is a reservoir (Vitter's algorithm R) of the rows of SFT, and one of the preference pairs of DPO,
    where a recipe has that half; old pairs are the ones that the model of their time sampled, and a task for which
    none are found replays none. Remembered rows are shuffled among the new ones in every pass. The whole delta is
    kept in bf16, as `sequential` does, and the memory's texts beside it.
    """

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        size: Count = 500,
        share: Annotated[Rest, Strength(0.05, 0.1, 0.2, 0.3, 0.5)] = 0.3,
        select: Literal["reservoir", "surprise"] = "reservoir",
    ) -> Kept:
        """size: rows of each reservoir; 500 is the middle one of Mammoth's 200, 500 and 5120.

        share: of a stage's rows that are old, to the nearest row, once there are any; a memory with fewer is gone
        through more than once. EasyCL's replay_ratio .3 is a part of each old task's data instead, and TRACE's 10 %
        is, too: both grow with the number of tasks, a share does not.
        select: `surprise` keeps, of every task as many, the rows on which the model loses most when it comes to the
        task: the memory of SuRe (arXiv 2511.22367) without its slow weights; `sure` has both.
        """
        self.remember(size, share, Surprising if select == "surprise" else Reservoir)
        return Kept(context.dense(self.fine_tune(task, context)), self.foreseen())
