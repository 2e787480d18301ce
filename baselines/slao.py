"""SLAO: one LoRA, started from an orthonormal A and merged into the last one (Qiao & Mahdavi 2025, arXiv 2512.23017).

Of task i > 1, A starts as Q^T, where Q R = A_ft^T of the last task's tuned A and R has a positive diagonal, B as the
last task's tuned B ("Last-FT" in the paper's ablation); the base alone is beneath. Then A_merged = A_ft and
B_merged <- B_merged + (B_ft - B_merged) / sqrt(i). The merged adapter answers. The paper's rank is 8 on queries and
values and it names no alpha; here adapters are as for `lora`.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from cl_graft.ranges import Count, Positive, Rest
from cl_graft.skillpack.codecs import Spec
from cl_graft.skillpack.codecs.exact import exact, exact_spec, original
from cl_graft.strategy import Context, Kept, Strategy
from cl_graft.task import Task
from cl_graft.training.adapters import (
    Adapter,
    encoded,
    faster,
    largest_rank,
    require_dropout,
    transposed,
)

TUNED = (
    "tuned"  # the shared artefact: B as the last task has tuned it, bf16; its A is that of the pack
)


class slao(Strategy):
    """rank: None takes the largest of which the merged adapter and the tuned B fit the budget; 8 is the published one.
    alpha_over_rank, dropout, learning_rate_scale: as for `lora`."""

    keeps = "latest"
    touches = ("attention", "mlp", "other")

    def check(self, context: Context, **options: Any) -> None:
        require_dropout(self.model, options["dropout"], "slao.dropout")
        self._rank(context, options["rank"])

    def _rank(self, context: Context, rank: int | None) -> int:
        sideways = transposed(self.model)

        def cost(specs: Mapping[str, Spec]) -> int:
            tuned = {
                name: exact_spec(
                    (*shape[:-2], shape[-1 if name in sideways else -2], meta["rank"]),
                    torch.bfloat16,
                )
                for name, (_, shape, meta) in specs.items()
            }
            return context.cost_of(specs) + context.cost_of(tuned)

        return largest_rank(self.model, cost, context.budget, given=rank, name="slao.rank")

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        rank: Count | None = None,
        alpha_over_rank: Positive = 2.0,
        dropout: Rest = 0.0,
        learning_rate_scale: Positive = 3.0,
    ) -> Kept:
        last, number = self.shared.get(TUNED), len(self.packs) + 1
        rank = next(iter(last.tensors.values())).shape[-1] if last else self._rank(context, rank)
        self.restore_base()  # the adapter itself holds what was learned
        with Adapter(self.model, rank, alpha_over_rank, dropout) as adapter:
            before = adapter.read(self.packs[-1].tensors) if last else {}
            if last:
                tuned = {name: original(kept).float() for name, kept in last.tensors.items()}
                adapter.put({n: (orthonormal(a), tuned[n].to(a)) for n, (a, _) in before.items()})
            self.teach(adapter.model, faster(task, learning_rate_scale))
            after = adapter.weights()
            merged = {n: (a, before[n][1].to(b) if last else b) for n, (a, b) in after.items()}
            merged = {n: (a, b.lerp(after[n][1], 1 / sqrt(number))) for n, (a, b) in merged.items()}
            own = {name: encoded(pair) for name, pair in adapter.laid_out(merged).items()}
        return Kept(own, {TUNED: {name: exact(b.bfloat16()) for name, (_, b) in after.items()}})


def orthonormal(a: Tensor) -> Tensor:
    """Q^T of the QR decomposition of A^T whose R has a positive diagonal; A (..., rank, in), as wide as its rank."""
    q, r = torch.linalg.qr(a.mT)
    signs = r.diagonal(dim1=-2, dim2=-1).sign()
    return (q * torch.where(signs == 0, 1, signs)[..., None, :]).mT
