"""GEM: no earlier task's memory may lose by a step (Lopez-Paz & Ranzato 2017, arXiv 1706.08840)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import nnls
from torch import Tensor

from cl_graft.ranges import Count, NotNegative
from cl_graft.strategy import Context, Kept, Strategy
from cl_graft.strategy.kept import Tensors
from cl_graft.strategy.memory import MEMORY, Memory, gradients, some, tokens
from cl_graft.task import Task
from cl_graft.training.config import sft_job
from cl_graft.training.term import Term


class gem(Strategy):
    """Where a step's gradient g has a negative inner product with that of some earlier task's memory, it becomes the
    nearest g + G^T v that has none, where the rows of G are the memories' gradients and v minimises
    1/2 v^T G G^T v + (G g)^T v (the paper's equation 11).

    `strength` is as in the authors' code, v >= strength, where the paper adds it to v >= 0. To first order no
    memory's loss rises then under SGD; AdamW, which the recipes use, scales what comes out. Memories are of texts of
    SFT's, also while DPO trains. A step costs a forward and backward pass over every memory, each in one piece with its
    logits, and holds a gradient an earlier task.
    """

    keeps = "latest"
    terms = ("project",)
    budgeted = False

    def learn(
        self, task: Task, context: Context, *, size: Count = 32, strength: NotNegative = 0.5
    ) -> Kept:
        """size: examples of each task's memory, drawn evenly, all of them read in every step; the authors keep 256
        images of each, and texts of hundreds of tokens are more than that. strength: the authors', and EasyCL's."""
        kept = self.shared.get(MEMORY)
        self.memory = Memory(size, self.seed, kept and kept.tensors)
        old = [self.memory[str(number)].rows for number in range(len(self.packs))]
        terms = []
        if old:
            rows = [row for of_one in old for row in of_one]
            state = tokens(context.tokenizer, rows, task.training.max_length)
            options = {"counts": [len(of_one) for of_one in old], "strength": strength}
            terms = [Term.project(project, state, gradients=len(old), **options)]
        self.memory.see(str(len(self.packs)), sft_job(task, self.seed)[0])
        return Kept(context.dense(self.fine_tune(task, context, terms)), self.foreseen())

    def foreseen(self) -> Mapping[str, Tensors]:
        return {MEMORY: self.memory.tensors()}


def project(
    model: Any,
    found: dict[str, Tensor],
    state: dict[str, Tensor],
    step: int,
    *,
    counts: Sequence[int],
    strength: float,
) -> None:
    """Change the gradients in place where a memory would lose. state: the memories' tokens, one task after the other,
    so many rows each."""
    ends = np.cumsum(counts)
    parts = [range(end - count, end) for end, count in zip(ends, counts, strict=True)]
    every = [gradients(model, some(state, part), found) for part in parts]
    against = torch.stack([_inner(old, found) for old in every])
    if (against >= 0).all():
        return
    products = torch.stack([torch.stack([_inner(a, b) for b in every]) for a in every])
    found_v = multipliers(products.cpu().numpy(), against.cpu().numpy(), strength)
    for v, old in zip(found_v, every, strict=True):
        for name, gradient in found.items():
            if (there := old[name]) is not None:
                gradient.add_(there.to(gradient.dtype), alpha=float(v))


def multipliers(products: np.ndarray, against: np.ndarray, strength: float) -> np.ndarray:
    """The v >= strength that minimises 1/2 v^T P v + c^T v, of P = G G^T (t, t) and c = G g (t,), float64.

    With u = v - strength >= 0 and P = M^T M it is the least-squares problem |M u - d|, M^T d = -(c + strength P 1).
    """
    values, vectors = np.linalg.eigh(products)
    there = values > values.max(initial=0) * 1e-12  # memories alike have one direction
    root = np.sqrt(values[there])[:, None] * vectors[:, there].T
    wanted = against + strength * products.sum(1)
    target = -(vectors[:, there].T @ wanted) / np.sqrt(values[there])
    return strength + nnls(root, target)[0]


def _inner(a: Mapping[str, Tensor | None], b: Mapping[str, Tensor | None]) -> Tensor:
    pairs = [(x, b[name]) for name, x in a.items() if x is not None and b[name] is not None]
    return torch.stack([(x * y).sum(dtype=torch.float64) for x, y in pairs]).sum()
