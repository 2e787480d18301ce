"""SuRe: the most surprising rows are replayed, slow weights answer (Hazard et al. 2025, arXiv 2511.22367).

Surprise is the mean negative log-likelihood of a whole row, prompt included, under the model as it comes to the row's
task ("before" in the paper's ablation); every task has an equal part of the memory, and the least surprising rows of
the older ones make room. Old rows are drawn evenly. The slow LoRA is the moving average of the fast one's A and B.

Where its code (HHazard2002/continual-learning) differs: it averages after every micro-batch, 64 to a step, here a step
is the same however it is cut; it may replay rows of the task that it trains on; its LoRA is on queries and values.
"""

from __future__ import annotations

from cl_graft.ranges import Count, Positive, Rest, Share
from cl_graft.strategy import Context, Kept
from cl_graft.strategy.memory import Surprising
from cl_graft.strategy.replaying import Averaged
from cl_graft.task import Task


class sure(Averaged):
    """One LoRA is trained on from task to task, with rows of a memory among the new ones as for `replay`; its moving
    average answers. DPO's pairs have a memory of their own, where the prompt and the chosen answer surprise."""

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        decay: Share = 0.99,
        size: Count = 500,
        share: Rest = 0.25,
        rank: Count = 8,
        alpha_over_rank: Positive = 2.0,
        dropout: Rest = 0.1,
        learning_rate_scale: Positive = 3.0,
    ) -> Kept:
        """decay: the slow weights' own part in the average; its code's. size: rows of the memory, its code's. share:
        every other batch of its code has as many old rows as new ones and weighs both alike, which is a quarter.
        rank, alpha_over_rank, dropout: its code's 8, 16 / 8 and 0.1. learning_rate_scale: as for `lora`."""
        self.remember(size, share, Surprising)
        return self.taught(
            task,
            decay=decay,
            rank=rank,
            alpha_over_rank=alpha_over_rank,
            dropout=dropout,
            learning_rate_scale=learning_rate_scale,
        )
