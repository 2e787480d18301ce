"""A feed-forward classifier of two layers on the base's features, as GraftLLM routes (arXiv 2505.18502).

It cannot be updated by a new task alone, as the sums of other routers can: it would forget the old ones. So some
features of every task are kept, bounded and counted, and it is trained anew on all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cl_graft.ranges import Count, Positive
from cl_graft.routing.base import Router, State

STEPS, DECAY = 200, 1e-2


class classifier(Router):
    """Logits of the tasks; trained by AdamW on the kept features, which are brought to mean 0 and variance 1."""

    def __init__(self, *, kept: Count = 64, hidden: Count = 64, learning_rate: Positive = 1e-2):
        """kept: features of each task that stay, in bf16. hidden: units of the layer between."""
        self.kept, self.hidden, self.learning_rate = kept, hidden, learning_rate

    def update(self, state: State, features: Tensor, task: int) -> State:
        """Append to `features` (kept, width) and `owners`; `first` and `second` are the layers, each with its bias."""
        mine = features[: self.kept].bfloat16()  # the prompts come in a random order
        owners = torch.full((len(mine),), task, dtype=torch.int32)
        if state:
            mine = torch.cat([state["features"], mine])
            owners = torch.cat([state["owners"], owners])
        first, second = self._trained(mine.float(), owners.long())
        return {"features": mine, "owners": owners, "first": first, "second": second}

    def scores(self, state: State, features: Tensor) -> Tensor:
        return _logits(features, state["first"], state["second"])

    def _trained(self, x: Tensor, owners: Tensor) -> tuple[Tensor, Tensor]:
        """Layers (width + 1, hidden) and (hidden + 1, tasks), float32, that take features as they come."""
        draw = torch.Generator().manual_seed(0)
        mean, spread = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
        width, tasks = x.shape[1], int(owners.max()) + 1
        weight = torch.bincount(owners).float().reciprocal()  # tasks of equal weight
        with torch.enable_grad():
            first = torch.randn(width + 1, self.hidden, generator=draw) * width**-0.5
            second = torch.randn(self.hidden + 1, tasks, generator=draw) * self.hidden**-0.5
            layers = [layer.requires_grad_() for layer in (first, second)]
            tuned = torch.optim.AdamW(layers, lr=self.learning_rate, weight_decay=DECAY)
            for _ in range(STEPS):
                tuned.zero_grad()
                cross_entropy(_logits((x - mean) / spread, *layers), owners, weight).backward()
                tuned.step()
        first, second = (layer.detach() for layer in layers)
        scaled = first[:-1] / spread[:, None]
        return torch.cat([scaled, first[-1:] - mean @ scaled]), second


def _logits(x: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(prompts, tasks) of x (prompts, width); the last row of a layer is its bias."""
    hidden = (x @ first[:-1] + first[-1]).relu()
    return hidden @ second[:-1] + second[-1]
