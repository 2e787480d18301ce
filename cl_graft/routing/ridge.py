"""Ridge regression from features to tasks by two sums, X^T X and X^T Y: exact without old data (arXiv 2503.13575)."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_graft.ranges import Positive
from cl_graft.routing.base import Router, State


class ridge(Router):
    """Least squares on one-hot tasks, each task of equal weight; a constant is among the features."""

    temperature = 0.1

    def __init__(self, *, regularisation: Positive = 1e-3):
        """regularisation: added to the diagonal of X^T X, as a share of its mean."""
        self.regularisation = regularisation

    def update(self, state: State, features: Tensor, task: int) -> State:
        """Add the task's sums: `products` the upper triangle of X^T X, `sums` (tasks, width + 1) the rows of X^T Y."""
        x = _with_constant(features)
        x = x / len(x) ** 0.5  # as many prompts of one task as of another
        products = (x.T @ x)[_triangle(x.shape[1])]
        mine = (x / len(x) ** 0.5).sum(0, keepdim=True)
        if not state:
            return {"products": products.float(), "sums": mine.float()}
        return {
            "products": (state["products"] + products).float(),
            "sums": torch.cat([state["sums"], mine.float()]),
        }

    def scores(self, state: State, features: Tensor) -> Tensor:
        x, sums = _with_constant(features), state["sums"].double()
        gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
        gram[_triangle(x.shape[1])] = state["products"].double()
        gram = gram + gram.triu(1).T
        gram.diagonal().add_(self.regularisation * gram.diagonal().mean())
        return x @ torch.linalg.solve(gram, sums.T)


def _with_constant(features: Tensor) -> Tensor:
    """Features with a constant 1 behind them, float64 (prompts, width + 1)."""
    x = features.double()
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


def _triangle(width: int) -> tuple[Tensor, Tensor]:
    rows, columns = torch.triu_indices(width, width)
    return rows, columns
