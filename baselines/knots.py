"""KnOTS: align the tasks' deltas by one SVD, merge them there by TIES (Stoica et al. 2024, arXiv 2410.19735).

Of each matrix the deltas stand side by side, [D_1 | ... | D_T] = U S [V_1 | ... | V_T]; TIES (arXiv 2306.01708) merges
the S V_t, trimmed over all matrices together, and U times what comes of it, scaled, is the delta. As in gstoica27/KnOTS
(task_merger.py) the SVD is in float64, and directions of singular values up to 1e-5 are left out. A vector is merged as
it stands: as the diagonal matrix that the released code makes of it, it would come back in another order, no more. The
paper merges LoRA of attention; here it is whatever was tuned.

The delta, unscaled, is the shared artefact `vector`, bf16, made anew after each task from every task's delta in bf16.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated

import torch
from torch import Tensor

from cl_graft.ranges import Part, Positive, Strength
from cl_graft.skillpack.codecs import decode, dense
from cl_graft.strategy import Kept, Strategy
from cl_graft.strategy.choose import composed_scaled, kept_scaled
from cl_graft.strategy.context import Context
from cl_graft.strategy.kept import Tensors
from cl_graft.task import Task

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
LEAST = 1e-5


class knots(Strategy):
    """density: share of each task's aligned entries kept by magnitude, over all parameters.

    1 is the released configuration for Llama-3-8B; its vision models have 0.2. Less than 1 takes three SVDs of each
    matrix instead of one. scale: factor on the result; None chooses it among 0.1, 0.2, ..., 1.0, the released search,
    by the loss on the validation data of all tasks seen, anew after each task. One task alone is itself.
    """

    keeps = "merged"
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        density: Annotated[Part, Strength(0.1, 0.2, 0.4, 0.7, 1.0)] = 1.0,
        scale: Positive | None = None,
    ) -> Kept:
        own = context.dense(self.fine_tune(task, context))
        if not self.packs:
            return Kept(own)
        merged = tied([*(pack.tensors for pack in self.packs), own], density)
        vector = {name: dense(delta) for name, delta in merged}
        return kept_scaled(self, task, own, vector, GRID, scale)

    # by the recipe alone, so that its stages are those of all methods that train from the base
    learn.pure = True

    def compose(self, task):
        return composed_scaled(self)


def tied(deltas: Sequence[Tensors], density: float) -> Iterator[tuple[str, Tensor]]:
    """(parameter, its merged delta, float32, unscaled), from the tasks' deltas {parameter: encoded}, one at a time."""
    least = thresholds(deltas, density) if density < 1 else torch.zeros(len(deltas))
    for name in deltas[0]:
        basis, parts = aligned([decode(tensors[name]) for tensors in deltas])
        merged = ties(parts, least.view(-1, *[1] * (parts.dim() - 1)))
        yield name, merged if basis is None else (basis @ merged.double()).float()


def aligned(deltas: Sequence[Tensor]) -> tuple[Tensor | None, Tensor]:
    """A parameter's basis U (..., m, r), float64, and the tasks' parts S V_t (T, ..., r, n), float32.

    deltas: (..., m, n), float32; stacked matrices are aligned each by itself, with zeros for directions that only
    others have. A vector has no basis, and its parts are its deltas.
    """
    if deltas[0].dim() < 2:
        return None, torch.stack(list(deltas))
    left, sizes, right = torch.linalg.svd(torch.cat(list(deltas), -1).double(), full_matrices=False)
    sizes = sizes * (sizes > LEAST)
    rank = int((sizes > 0).sum(-1).max())
    parts = (sizes.unsqueeze(-1) * right)[..., :rank, :].float()
    return left[..., :rank], torch.stack(parts.split(deltas[0].shape[-1], -1))


def ties(parts: Tensor, least: Tensor) -> Tensor:
    """Mean of what agrees, of each entry of `parts` (T, ...): magnitudes from `least` on that have the sum's sign."""
    trimmed = parts.where(parts.abs() >= least, 0.0)
    agrees = (trimmed * trimmed.sum(0).sign()) > 0
    return (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1)


def thresholds(deltas: Sequence[Tensors], density: float) -> Tensor:
    """float32 (T,): magnitude of the smallest of a task's aligned entries that are kept, over all parameters, exactly.

    As `ties` finds its own: by two counts, of the upper and of the lower 16 bits of the magnitudes.
    """

    def counted(upper: Tensor | None = None) -> Tensor:
        counts = torch.zeros(len(deltas), 1 << 16, dtype=torch.int64)
        for name in deltas[0]:
            _, parts = aligned([decode(tensors[name]) for tensors in deltas])
            for task, bits in enumerate(parts.abs().flatten(1).view(torch.int32)):
                some = bits >> 16 if upper is None else bits[bits >> 16 == upper[task]] & 0xFFFF
                counts[task] += torch.bincount(some, minlength=1 << 16)
        return counts

    counts = counted()
    total = int(counts[0].sum())
    # of the rank from the smallest on; the same number of entries is every task's
    rank = torch.full((len(deltas), 1), total - max(1, int(density * total)))
    upper = torch.searchsorted(counts.cumsum(1), rank, right=True)
    rank = rank - (counts.cumsum(1) - counts).gather(1, upper)
    lower = torch.searchsorted(counted(upper.flatten()).cumsum(1), rank, right=True)
    return (upper << 16 | lower).to(torch.int32).view(torch.float32).flatten()
