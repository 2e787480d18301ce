"""UltraDelta: quantise, then prune within each value, more where a delta varies less (arXiv 2505.13563).

Each tensor is quantised uniformly from its least to its greatest entry; of the entries of each of its 2^bits values the
same share is then dropped at random, so that their distribution stays. That share, the sparsity, is by the standard
deviation of the tensor: `step` above the target in the third of the parameters in the tensors that vary least, the
target in the next third, and in the last what makes the mean the target, at most 0.99. What is left is divided by one
minus the target. The target is the least that the budget holds, for all tensors; the released code
(xiaohuiwang000/UltraDelta) takes attention and MLP alone. Its further factor is, of several tasks, the least trace norm
of their deltas over the task's own; tasks come one after another here, and of one alone it is 1: `factor` is left to
the user.
"""

from typing import Annotated, Literal

import torch

from cl_graft.budget import largest_within
from cl_graft.ranges import Positive, Share, Strength
from cl_graft.skillpack.codecs import sparse_codebook, sparse_codebook_spec
from cl_graft.strategy import compressor

PARTS = 4096
MOST = 0.99  # sparsity of a tensor


@compressor(keeps="per_task")
def ultradelta(
    delta,
    context,
    *,
    bits: Literal[1, 2, 3, 4, 5, 6, 7, 8] = 4,
    step: Share = 0.01,
    factor: Annotated[Positive, Strength(0.5, 0.7, 1.0, 1.4, 2.0)] = 1.0,
):
    """bits: of a value. step: of the sparsity between thirds. factor: on all that is left, beside 1 / (1 - target)."""
    tensors = {n: Grouped(x, bits, context.seed_of(n)) for n, x in delta.items() if x.any()}
    deviations = {n: (t.deviation, t.codes.numel()) for n, t in tensors.items()}

    def masks(count):
        rates = sparsities(deviations, 1 - count / PARTS, step)
        found = {n: t.mask(rates[n]) for n, t in tensors.items()}
        return {n: mask for n, mask in found.items() if mask.any()}

    def cost(count):
        return context.cost_of({n: sparse_codebook_spec(m, bits) for n, m in masks(count).items()})

    count = largest_within(context.budget, cost, PARTS, "one entry in 4096")
    scale = factor * PARTS / count
    return {
        n: sparse_codebook(tensors[n].codes, mask, tensors[n].levels * scale)
        for n, mask in masks(count).items()
    }


def sparsities(deviations, target, step):
    """{name: sparsity} that have the mean `target` over all parameters where `MOST` allows it.

    deviations: {name: (standard deviation, parameters)}.
    """
    total, seen, weight, rates = sum(size for _, size in deviations.values()), 0, 0.0, {}
    last = []
    for name in sorted(deviations, key=lambda name: deviations[name][0]):
        size = deviations[name][1]
        seen += size
        if seen > 2 * total / 3:
            last.append(name)
            continue
        rates[name] = target + step if seen <= total / 3 else target
        weight += rates[name] * size
    left = sum(deviations[name][1] for name in last)
    rest = min(MOST, max(0.0, (target * total - weight) / left)) if left else target
    return {n: min(1.0, rate) for n, rate in rates.items()} | dict.fromkeys(last, rest)


class Grouped:
    """A tensor on a uniform grid from its least to its greatest entry.

    codes: uint8, of its shape. levels: float32 (2**bits,). place: of each entry among those of its value, drawn at
    random; count: how many these are.
    """

    def __init__(self, x, bits, seed):
        x = x.detach().cpu().float()
        self.deviation = float(x.double().std(correction=0))
        low, high = x.min(), x.max()
        top = 2**bits - 1
        span = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        self.codes = ((x - low) / span * top).round().byte()
        self.levels = torch.arange(top + 1) / top * (high - low) + low
        flat = self.codes.flatten().long()
        drawn = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
        order = drawn[flat[drawn].argsort(stable=True)]
        counts = torch.bincount(flat, minlength=top + 1)
        starts = counts.cumsum(0) - counts
        place = torch.empty_like(flat)
        place[order] = torch.arange(len(flat)) - starts[flat[order]]
        self.place, self.count = place.view(x.shape), counts[flat].view(x.shape)
        self.zero = (self.levels == 0)[flat].view(x.shape)

    def mask(self, sparsity):
        """What is left at this sparsity, counting values that are zero as dropped: bool."""
        zeros = float(self.zero.float().mean())
        rate = max(0.0, (sparsity - zeros) / (1 - zeros)) if zeros < 1 else 0.0
        return (self.place >= (self.count * rate).round()) & ~self.zero
