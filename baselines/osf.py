"""OSF: the top singular directions of every matrix are kept, the others trained (Nayak et al. 2025, arXiv 2504.07097).

Before a task each matrix of the layers is decomposed anew, W = U S V^T, and of every gradient G the part within its
first k directions is taken out: G - U_k U_k^T G V_k V_k^T (`paper`). PEFT's tuner, by the same authors, trains what is
beyond k of U, S and V and holds U and V apart from the first k, so nothing moves that has one of these on either side:
(I - U_k U_k^T) G (I - V_k V_k^T) (`peft`). AdamW, which the recipes use, scales what comes out entry by entry, so some
of what is kept moves all the same, with PEFT's tuner, too: after 60 steps of nano-llama at k of a half 5 % of a delta's
squares lie within (`paper`), against 30 % of plain fine-tuning's.

The paper gives each layer a k by how alike its input and output are, between .1 and .8 of the directions; which
is not defined where they have different sizes, and is left out here.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from cl_graft.ranges import Part
from cl_graft.skillpack.codecs import Encoded
from cl_graft.strategy import Context, Strategy
from cl_graft.task import Task
from cl_graft.training.adapters import mixtures, targets
from cl_graft.training.term import Term


class osf(Strategy):
    """Embeddings, head and norms are frozen, as in PEFT's tuner; stacked experts are decomposed one by one. The whole
    delta is kept, as `sequential` does. A stage holds the directions kept, in float32: about a model more."""

    keeps = "latest"
    touches = ("attention", "mlp", "other")
    terms = ("project",)
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        first: Part = 0.3,
        last: Part = 0.7,
        projection: Literal["paper", "peft"] = "paper",
    ) -> dict[str, Encoded]:
        """first, last: share of a matrix's directions kept in the first task and in the last, in equal steps between:
        PEFT's example for continual learning has .3, .5, .7. Each is what PEFT calls `effective_rank`, the share that
        is *kept*; its default None is .5."""
        steps = max(1, len(self.scenario.tasks) - 1)
        share = first + (last - first) * min(len(self.packs), steps) / steps
        term = Term.project(project, directions(self.model, share), gradients=0, which=projection)
        return context.dense(self.fine_tune(task, context, [term]))


@torch.no_grad()
def directions(model: Any, share: float) -> dict[str, Tensor]:
    """{left/parameter: U_k (..., rows, k), right/parameter: V_k^T (..., k, cols)}, float32, of every matrix of the
    layers; k is that share of the smaller side, rounded down."""
    matrices = {f"{name}.weight": layer.weight for name, layer in targets(model).items()}
    state = {}
    for name, weight in (matrices | mixtures(model)).items():
        left, _, right = torch.linalg.svd(weight.float(), full_matrices=False)
        k = int(min(weight.shape[-2:]) * share)
        state |= {f"left/{name}": left[..., :k].clone(), f"right/{name}": right[..., :k, :].clone()}
    return state


def project(
    model: Any, gradients: dict[str, Tensor], state: dict[str, Tensor], step: int, *, which: str
) -> None:
    """Take what is kept out of the gradients, in place."""
    for name, gradient in gradients.items():
        if f"left/{name}" not in state:
            continue
        left, right = state[f"left/{name}"], state[f"right/{name}"]
        core = left.mT @ gradient
        if which == "paper":
            gradient.sub_(left @ (core @ right.mT) @ right)
        else:
            gradient.sub_(left @ core)
            gradient.sub_((gradient @ right.mT) @ right)
