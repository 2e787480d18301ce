"""LoRA on every matrix of the layers, by PEFT, under four conventions (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from cl_graft.ranges import Count, Positive, Rest
from cl_graft.skillpack.codecs import Encoded
from cl_graft.strategy import Strategy
from cl_graft.strategy.context import Context
from cl_graft.task import Task
from cl_graft.training.adapters import Adapter, encoded, faster, largest_rank, require_dropout


class lora(Strategy):
    """convention: `trained_on` trains one adapter on from task to task (SeqLoRA); `summed` freezes the old
    adapters and adds a new one, kept as a pack of its own (IncLoRA); `merged` folds each adapter into the
    weights and stores the running sum as one pack; `each` trains an adapter per task from the base, and the task's
    own answers: it is told the task, or infers it.
    rank: None takes the largest that the budget holds (for `merged`, an equal share for every task).
    """

    touches = ("attention", "mlp", "other")
    keeps: ClassVar = {
        "each": "per_task",
        "trained_on": "latest",
        "summed": "sum",
        "merged": "latest",
    }

    def check(self, context: Context, **options: Any) -> None:
        require_dropout(self.model, options["dropout"], "lora.dropout")
        self._rank(context, options["convention"], options["rank"])

    def _rank(self, context: Context, convention: str, rank: int | None) -> int:
        shares = len(self.scenario.tasks) if convention == "merged" else 1
        return largest_rank(self.model, context.cost_of, context.budget, shares, rank, "lora.rank")

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        convention: str = "trained_on",
        rank: Count | None = None,
        alpha_over_rank: Positive = 2.0,
        dropout: Rest = 0.0,
        learning_rate_scale: Positive = 3.0,
    ) -> dict[str, Encoded]:
        rank = self._rank(context, convention, rank)
        continued = self.packs[-1] if convention == "trained_on" and self.packs else None
        if continued:  # the adapter itself holds what was learned: its base is the base
            self.restore_base()
        with Adapter(self.model, rank, alpha_over_rank, dropout) as adapter:
            if continued:
                adapter.load(continued.tensors)
            self.teach(adapter.model, faster(task, learning_rate_scale))
            factors = adapter.factors()
        if convention == "merged" and self.packs:
            earlier = self.packs[-1].tensors
            factors = {n: _joined(earlier[n], left, right) for n, (left, right) in factors.items()}
        return {name: encoded(pair) for name, pair in factors.items()}


def _joined(earlier: Encoded, left: torch.Tensor, right: torch.Tensor) -> tuple:
    old_left, old_right = earlier.parts["left"].float(), earlier.parts["right"].float()
    return torch.cat([old_left, left], -1), torch.cat([old_right, right], -2)
