"""DARE as storage: entries dropped at random, those left scaled up (Yu et al. 2023, arXiv 2311.03099).

Each entry is dropped with probability p and else divided by 1 - p, so that the expected delta is the delta. Which are
left follows from a seed (`seeded_sparse`): a kept entry costs its 16 bits and no position. The paper finds p from 0.9
to 0.99 harmless for models of 7 B and more; here p is the least that the budget allows, at most 127/128.
"""

from math import prod
from typing import Annotated

import numpy as np
from pydantic import Field

from cl_graft.budget import largest_share
from cl_graft.skillpack.codecs import seeded_sparse, seeded_sparse_spec
from cl_graft.skillpack.codecs.seeded_sparse import LEAST, WHOLE, draws
from cl_graft.strategy import compressor

# Rates in these parts: a seed's draws are counted once, in as many bins.
PARTS = 1 << 16
FIRST = LEAST * PARTS // WHOLE
ONE = "one entry in 128, each with 16 bits"


def foreseen(context, *, density: float | None) -> int:
    """The rate of what is kept, in 1/65536, by the numbers of entries that are to be expected."""

    def cost(rate):
        rate = max(FIRST, rate)
        return context.cost_of(
            {
                n: _spec(shape, round(rate / PARTS * prod(shape)), context.seed_of(n), rate)
                for n, shape in context.shapes.items()
            }
        )

    return largest_share(context.budget, cost, PARTS, ONE, density, "dare.density")


@compressor(keeps="per_task", check=foreseen)
def dare(delta, context, *, density: Annotated[float, Field(ge=FIRST / PARTS, le=1)] | None = None):
    """density: share of the entries that is kept, 1 - p; None takes the largest that the budget holds."""
    seeds = {name: context.seed_of(name) for name in delta}
    counts = {name: _counts(seeds[name], x.numel()) for name, x in delta.items()}

    def cost(rate):
        rate = max(FIRST, rate)
        return context.cost_of(
            {n: _spec(context.shapes[n], int(counts[n][rate - 1]), seeds[n], rate) for n in counts}
        )

    rate = largest_share(context.budget, cost, PARTS, ONE, density, "dare.density")
    return {
        name: seeded_sparse(x * (PARTS / rate), seeds[name], rate * (WHOLE // PARTS))
        for name, x in delta.items()
    }


def _counts(seed, numel):
    """int64 (PARTS,): how many elements are kept at each rate from 1 on."""
    found = np.zeros(PARTS, np.int64)
    for _, drawn in draws(seed, numel):
        # the upper 16 of 48 bits
        found += np.bincount((drawn >> np.uint64(32)).astype(np.int64), minlength=PARTS)
    return found.cumsum()


def _spec(shape, count, seed, rate):
    return seeded_sparse_spec(shape, count, seed, rate * (WHOLE // PARTS))
