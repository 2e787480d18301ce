"""TIES-merging: trim, elect a sign, average what agrees (Yadav et al. 2023, arXiv 2306.01708)."""

from typing import Annotated

import torch

from cl_graft.ranges import Part, Positive, Strength
from cl_graft.strategy import merger

# Entries at a time, of which several copies are held. A power of two: torch sums the last few columns of a tensor in
# another order than the rest, and those are then the same however many parts there are.
PART = 1 << 20


GRID = tuple(round(0.8 + 0.1 * n, 1) for n in range(18))


def threshold(delta, *, density):
    """Magnitude of the smallest of a task's entries that are kept, over all tensors together, exactly.

    Magnitudes of float32 are ordered as their bits are: two counts, of the upper and of the lower 16 bits, find the
    entry of a rank without ever sorting or holding all of them.
    """
    left = max(1, int(density * sum(x.numel() for x in delta.values())))
    upper, left = _of_rank(_counted(delta, lambda bits: bits >> 16), left)
    lower, _ = _of_rank(_counted(delta, lambda bits: bits[bits >> 16 == upper] & 0xFFFF), left)
    return torch.tensor(upper << 16 | lower, dtype=torch.int32).view(torch.float32).item()


def _counted(delta, part):
    """How often each value of 16 bits occurs among those that `part` takes from the entries' bits."""
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for x in delta.values():
        for some in x.abs().flatten().split(PART):
            counts += torch.bincount(part(some.view(torch.int32)), minlength=1 << 16)
    return counts


def _of_rank(counts, rank):
    """The value of the entry of this rank, counted from the largest on, and its rank among those of its value."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, rank))
    return len(counts) - 1 - place, rank - (int(above[place - 1]) if place else 0)


@merger(statistic=threshold, grid={"scale": GRID})
def ties(
    deltas,
    thresholds,
    *,
    density: Annotated[Part, Strength(0.05, 0.1, 0.2, 0.4, 0.8)] = 0.2,
    scale: Positive | None = None,
):
    """density: share of each task's entries kept by magnitude, over all tensors; the paper's 20 %.

    scale: factor on the result; None chooses it among 0.8, 0.9, ..., 2.5 by the loss on the validation data of all
    tasks seen, anew after each task; the paper's recipe without validation data is 1. One task alone is itself, neither
    trimmed nor scaled: there is nothing to merge, and the paper speaks of two tasks and more.
    """
    merged = torch.empty_like(deltas[0])
    for to, *parts in zip(*(x.view(-1).split(PART) for x in (merged, *deltas)), strict=True):
        pairs = zip(parts, thresholds, strict=True)
        trimmed = torch.stack([torch.where(x.abs() >= least, x, 0.0) for x, least in pairs])
        agrees = (trimmed * trimmed.sum(0).sign()) > 0
        to.copy_(scale * (trimmed * agrees).sum(0) / agrees.sum(0).clamp_min(1))
    return merged
