"""Nearest mean by the Mahalanobis distance of one covariance that all tasks share (FeCAM, arXiv 2309.14062).

Optionally after a random projection and a ReLU, as RanPAC has it (arXiv 2307.02251). Both come out of sums: exact
without old data.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from cl_graft.ranges import Field, Positive
from cl_graft.routing.base import Router, State


class mahalanobis(Router):
    """Minus half the squared distance to a task's mean, tasks of equal weight: their log-density up to a constant."""

    def __init__(self, *, shrinkage: Positive = 1e-2, projection: Annotated[int, Field(ge=0)] = 0):
        """shrinkage: added to the covariance's diagonal, as a share of its mean. projection: how many random features
        take the place of the base's; 0 leaves those."""
        self.shrinkage, self.projection = shrinkage, projection

    def update(self, state: State, features: Tensor, task: int) -> State:
        """Append to `means` (tasks, width); add the task's covariance to `within`, the upper triangle of their sum."""
        x = self._projected(features)
        mean = x.mean(0, keepdim=True)
        within = (x - mean).T @ (x - mean) / len(x)
        rows, columns = torch.triu_indices(*within.shape)
        mine = within[rows, columns].float()
        if not state:
            return {"means": mean.float(), "within": mine}
        return {
            "means": torch.cat([state["means"], mean.float()]),
            "within": state["within"] + mine,
        }

    def scores(self, state: State, features: Tensor) -> Tensor:
        x, means = self._projected(features), state["means"].double()
        covariance = x.new_zeros(x.shape[1], x.shape[1])
        rows, columns = torch.triu_indices(*covariance.shape)
        covariance[rows, columns] = state["within"].double() / len(means)
        covariance = covariance + covariance.triu(1).T
        floor = torch.finfo(torch.float32).tiny  # where all prompts of a task are alike
        covariance.diagonal().add_(self.shrinkage * covariance.diagonal().mean() + floor)
        root = torch.linalg.cholesky(covariance)
        white, centres = (
            torch.linalg.solve_triangular(root, y.T, upper=False).T for y in (x, means)
        )
        return -0.5 * torch.cdist(white, centres, compute_mode="donot_use_mm_for_euclid_dist") ** 2

    def _projected(self, features: Tensor) -> Tensor:
        """float64 (prompts, width), or (prompts, projection)."""
        x = features.double()
        if not self.projection:
            return x
        draw = torch.Generator().manual_seed(0)
        drawn = torch.randn(x.shape[1], self.projection, generator=draw, dtype=torch.float64)
        return (x @ drawn).relu()
