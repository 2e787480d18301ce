"""Nearest of several centroids of each task's features, found by k-means; nothing is trained (arXiv 2606.19079)."""

from __future__ import annotations

import torch
from scipy.cluster.vq import kmeans2
from torch import Tensor

from cl_graft.ranges import Count
from cl_graft.routing.base import Router, State


class centroids(Router):
    """The task whose centroid has the largest cosine with the prompt's features."""

    temperature = 0.05

    def __init__(self, *, per_task: Count = 8):
        """per_task: centroids of a task; fewer where it has fewer prompts."""
        self.per_task = per_task

    def update(self, state: State, features: Tensor, task: int) -> State:
        """Append `centres` (centroids, width) in bf16, and the task of each in `owners`."""
        directions = torch.nn.functional.normalize(features).double().numpy()
        count = min(self.per_task, len(directions))
        centres, _ = kmeans2(directions, count, minit="++", rng=task, missing="warn")
        mine = torch.from_numpy(centres).bfloat16()
        owners = torch.full((len(mine),), task, dtype=torch.int32)
        if not state:
            return {"centres": mine, "owners": owners}
        return {
            "centres": torch.cat([state["centres"], mine]),
            "owners": torch.cat([state["owners"], owners]),
        }

    def scores(self, state: State, features: Tensor) -> Tensor:
        centres = torch.nn.functional.normalize(state["centres"].float())
        near = torch.nn.functional.normalize(features) @ centres.T
        owners = state["owners"]
        return torch.stack(
            [near[:, owners == task].amax(1) for task in range(int(owners.max()) + 1)], 1
        )
