"""ImPart: singular vectors thinned out at random by their importance, scaled up (Yang et al. 2025, arXiv 2504.13237).

Of D = sum s_k u_k v_k^T the last ranks are dropped, a share `pruned` of all. In rank k entries of u_k and v_k are
dropped with probability p_k = (1 - (s_k / s_1)^exponent) (a - pruned) / (1 - pruned), a the sparsity that is wanted,
and those left are divided by 1 - p_k, so that the expected product is the rank. Since the first ranks lose less than
the mean, further ranks are dropped from the end until 1 - a of all entries are left; where that is less than one rank,
the first is thinned out, too. The least a that the budget holds is taken, the same for all matrices; the paper has a's
of attention and MLP apart. Values are in 16 bit, vectors are kept so as a whole; the paper's further quantisation of
what is left is left out.
"""

from typing import Annotated

import torch

from cl_graft.budget import largest_within
from cl_graft.ranges import NotNegative, Rest, Strength
from cl_graft.skillpack.codecs import dense, dense_spec, sparse_low_rank, sparse_low_rank_spec
from cl_graft.skillpack.compress.factorise import spectrum
from cl_graft.skillpack.compress.singular import singular
from cl_graft.strategy import compressor

PARTS = 4096
ONE = "one entry of every matrix's factors"


def least(context):
    """Refuse a budget that holds not even one entry of every factor."""

    def spec(shape):
        if len(shape) != 2:
            return dense_spec(shape)
        meta = {"dtype": "BF16", "rank": 1, "left": [1, 1, 1], "right": [1, 1, 1]}
        return "sparse_low_rank", shape, meta

    specs = {name: spec(shape) for name, shape in context.shapes.items()}
    largest_within(context.budget, lambda count: context.cost_of(specs), 1, ONE)


@compressor(keeps="per_task", check=least)
def impart(
    delta,
    context,
    *,
    pruned: Annotated[Rest, Strength(0.2, 0.4, 0.6, 0.8, 0.9)] = 0.8,
    exponent: NotNegative = 0.5,
):
    """pruned: share of the ranks that is dropped whatever the budget, as the paper's beta. exponent: the paper's C, of
    the singular value's share of the first.
    """
    factors = {n: Factors(x, context.seed_of(n)) for n, x in delta.items() if x.ndim == 2}
    fixed = {n: dense(x) for n, x in delta.items() if x.ndim != 2}

    def cost(count):
        masks = {n: f.masks(count / PARTS, pruned, exponent)[:2] for n, f in factors.items()}
        specs = {n: sparse_low_rank_spec(*pair) for n, pair in masks.items()}
        return context.cost_of({n: e.spec for n, e in fixed.items()} | specs)

    density = largest_within(context.budget, cost, PARTS, ONE) / PARTS
    return fixed | {n: f.encoded(density, pruned, exponent) for n, f in factors.items()}


class Factors:
    """U^T (r, out) and S V^T (r, in) of a matrix, and a number from 0 to 1 drawn for each entry.

    values: float64 (r,), singular, falling.
    """

    def __init__(self, delta, seed):
        found = spectrum(delta, None)
        self.values = found.energy.sqrt().cpu()
        left, right = singular(delta, found, len(self.values))
        self.factors = left.T.cpu(), right.cpu()
        generator = torch.Generator().manual_seed(seed)
        self.drawn = [torch.rand(x.shape, generator=generator) for x in self.factors]

    def masks(self, density, pruned, exponent):
        """What is left of U^T and of S V^T at this density, bool, and p (r,)."""
        p = drop_rates(self.values, density, pruned, exponent)
        left, right = (drawn[: len(p)] >= p[:, None] for drawn in self.drawn)
        return left, right, p

    def encoded(self, density, pruned, exponent):
        *masks, p = self.masks(density, pruned, exponent)
        scale = (1 / (1 - p)).float()[:, None]
        pairs = zip(self.factors, masks, strict=True)
        return sparse_low_rank(*(x[: len(p)] * scale * mask for x, mask in pairs))


def drop_rates(values, density, pruned, exponent):
    """p of the ranks that are left, float64, the largest singular value first.

    values: all singular values, falling. density: 1 - a.
    """
    ranks = max(1, round((1 - pruned) * len(values)))
    share = (values[:ranks] / values[0].clamp_min(1e-300)) ** exponent
    rate = max(0.0, (1 - density - pruned) / (1 - pruned))
    p = (1 - share) * rate
    left = int(((1 - p).cumsum(0) <= density * len(values) + 1e-9).sum())
    if not left:  # the first rank alone is more than that
        return p.new_tensor([1 - density * len(values)])
    return p[:left]
