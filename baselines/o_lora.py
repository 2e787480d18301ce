"""O-LoRA: each task's adapter orthogonal to those before (Wang et al. 2023, arXiv 2310.14152).

loss = CE + lambda_1 * sum over layers of sum |A_old A_new^T| + lambda_2 * sum over layers of (||A_new|| + ||B_new||),
Frobenius norms, as in cmnfriend/O-LoRA (src/uie_trainer_lora.py), whose rank is 8, alpha 32, dropout 0.1, lambda_1 0.5
(5 for late tasks of its stream of 15) and lambda_2 0 to 0.3, on queries and values alone. Here the adapters are on all
matrices of the layers, as for `lora`. Its trainer divides CE by the micro-batches of a step and not the penalties;
here a step is the same however it is cut.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch

from cl_graft.ranges import Count, NotNegative, Positive, Rest, Strength
from cl_graft.skillpack.codecs import Encoded
from cl_graft.strategy import Strategy
from cl_graft.strategy.context import Context
from cl_graft.task import Task
from cl_graft.training.adapters import (
    Adapter,
    adapted_layers,
    down,
    downs,
    encoded,
    faster,
    largest_rank,
    require_dropout,
)
from cl_graft.training.term import Term


class o_lora(Strategy):
    """lambda_1, lambda_2: weights of overlap and of norms. alpha_over_rank: 32 / 8 as published.
    rank: None takes the largest that the budget holds, 8 is the published one. learning_rate_scale: as for `lora`.
    """

    keeps = "sum"
    touches = ("attention", "mlp", "other")
    terms = ("penalty",)

    def check(self, context: Context, **options: Any) -> None:
        require_dropout(self.model, options["dropout"], "o_lora.dropout")
        self._rank(context, options["rank"])

    def _rank(self, context: Context, rank: int | None) -> int:
        return largest_rank(
            self.model, context.cost_of, context.budget, given=rank, name="o_lora.rank"
        )

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        lambda_1: Annotated[NotNegative, Strength(0.02, 0.1, 0.5, 2.5, 12.5)] = 0.5,
        lambda_2: NotNegative = 0.0,
        rank: Count | None = None,
        alpha_over_rank: Positive = 4.0,
        dropout: Rest = 0.1,
        learning_rate_scale: Positive = 3.0,
    ) -> dict[str, Encoded]:
        rank = self._rank(context, rank)
        old = downs(self.model, self.packs)
        weights = {"lambda_1": lambda_1, "lambda_2": lambda_2}
        with Adapter(self.model, rank, alpha_over_rank, dropout) as adapter:
            terms = [Term.penalty(penalty, old, **weights)]
            self.teach(adapter.model, faster(task, learning_rate_scale), terms)
            factors = adapter.factors()
        return {name: encoded(pair) for name, pair in factors.items()}


def penalty(model, batch, output, state, *, lambda_1, lambda_2):
    """orthogonal and norms are added to the loss. norm_a, norm_b: mean Frobenius norms of the new A and B, not
    weighted and only logged: a small overlap of a shrunken adapter is no orthogonality.

    state: {parameter: the A of all old adapters, (sum of their ranks, in), of a stack of experts one each}; empty for
    the first task.
    """
    layers = adapted_layers(model)
    a = {name: layer.lora_A["default"].weight for name, layer in layers.items()}
    b = {name: layer.lora_B["default"].weight for name, layer in layers.items()}
    overlap = [(old @ down(layers[name]).mT).abs().sum() for name, old in state.items()]
    norms = [torch.stack([x.norm() for x in of.values()]) for of in (a, b)]
    return {
        "orthogonal": lambda_1
        * (torch.stack(overlap).sum() if overlap else norms[0].new_zeros(())),
        "norms": lambda_2 * (norms[0].sum() + norms[1].sum()),
        "norm_a": norms[0].detach().mean(),
        "norm_b": norms[1].detach().mean(),
    }
