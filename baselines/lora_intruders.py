"""LoRA whose intruder dimensions are damped after each task (Shuttleworth et al. 2024, arXiv 2410.21228)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cl_graft.ranges import Count, Positive, Rest, Share
from cl_graft.skillpack.codecs import Encoded
from cl_graft.strategy import Strategy
from cl_graft.strategy.context import Context
from cl_graft.task import Task
from cl_graft.training.adapters import (
    Adapter,
    Pair,
    encoded,
    faster,
    largest_rank,
    require_dropout,
)


class lora_intruders(Strategy):
    """An adapter a task, all of them active, as `lora` with `summed`. Of each matrix W that a new adapter makes, the
    first `top_k` left singular vectors are looked at: one whose cosine with every left singular vector of the weights
    below the adapter is under `epsilon` is an intruder, and W loses (1 - scale) of its part, u s v^T. What is left of
    the adapter is cut to its rank by an SVD. As PEFT's `reduce_intruder_dimension`, for experts and for matrices stored
    (in, out), too. Old adapters count as weights below: they were damped when they were new.
    """

    keeps = "sum"
    touches = ("attention", "mlp", "other")

    def check(self, context: Context, **options: Any) -> None:
        require_dropout(self.model, options["dropout"], "lora_intruders.dropout")
        self._rank(context, options["rank"])

    def _rank(self, context: Context, rank: int | None) -> int:
        cost, name = context.cost_of, "lora_intruders.rank"
        return largest_rank(self.model, cost, context.budget, given=rank, name=name)

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        top_k: Count = 10,
        epsilon: Share = 0.5,
        scale: Share = 0.75,
        rank: Count | None = None,
        alpha_over_rank: Positive = 2.0,
        dropout: Rest = 0.0,
        learning_rate_scale: Positive = 3.0,
    ) -> dict[str, Encoded]:
        """top_k, epsilon, scale: PEFT's defaults; scale is the paper's lambda, 1 damps nothing, 0 takes intruders away.
        rank: None takes the largest that the budget holds. learning_rate_scale: as for `lora`.
        """
        with Adapter(self.model, self._rank(context, rank), alpha_over_rank, dropout) as adapter:
            self.teach(adapter.model, faster(task, learning_rate_scale))
            factors = adapter.factors()
        kept = {}
        for name, pair in factors.items():
            below, turned = context.start[name].float(), name in adapter.transposed
            if turned:  # stored (in, out)
                pair, below = (pair[1].mT, pair[0].mT), below.mT
            up, down = reduced(pair, below, top_k, epsilon, scale)
            kept[name] = encoded((down.mT, up.mT) if turned else (up, down))
        return kept


@torch.no_grad()
def reduced(pair: Pair, below: Tensor, top_k: int, epsilon: float, scale: float) -> Pair:
    """Factors of the adapter, (..., out, rank) and (..., rank, in), less (1 - scale) of each intruder of below + delta.

    below: (..., out, in), float32. A stack of which no matrix has an intruder is given back as it is.
    """
    up, down = pair
    delta = up @ down
    basis = torch.linalg.svd(below, full_matrices=False).U
    left, values, right = torch.linalg.svd(below + delta, full_matrices=False)
    left, values, right = left[..., :top_k], values[..., :top_k], right[..., :top_k, :]
    intruders = (left.mT @ basis).abs().amax(-1) < epsilon
    if not intruders.any():
        return pair
    delta = delta - (1 - scale) * (left * (values * intruders)[..., None, :]) @ right
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    rank = up.shape[-1]
    root = values[..., :rank].sqrt()
    return left[..., :rank] * root[..., None, :], root[..., None] * right[..., :rank, :]
