"""DARE as storage: entries dropped at random, those left scaled up (Yu et al. 2023, arXiv 2311.03099).

Each entry is dropped with probability p and else divided by 1 - p, so that the expected delta is the delta. Which are
left follows from a seed (`seeded_sparse`): a kept entry costs its 16 bits and no position. The paper finds p from 0.9
to 0.99 harmless for models of 7 B and more; here p is the least that the budget allows. Beyond 127/128 it is refused.
"""

from math import prod

import numpy as np

from cl_graft.budget import largest_within
from cl_graft.ranges import Rest
from cl_graft.skillpack.codecs import seeded_sparse, seeded_sparse_spec
from cl_graft.skillpack.codecs.seeded_sparse import LEAST, WHOLE, draws
from cl_graft.strategy import compressor

# Rates in these parts: a seed's draws are counted once, in as many bins.
PARTS = 1 << 16
FIRST = LEAST * PARTS // WHOLE


def foreseen(context, *, drop_rate: float | None) -> int:
    """The rate of what is kept, in 1/65536, by the numbers of entries that are to be expected."""

    def cost(count):
        rate = FIRST - 1 + count
        return context.cost_of(
            {
                n: _spec(shape, round(rate / PARTS * prod(shape)), context.seed_of(n), rate)
                for n, shape in context.shapes.items()
            }
        )

    return _largest(context, cost, drop_rate)


@compressor(keeps="per_task", check=foreseen)
def dare(delta, context, *, drop_rate: Rest | None = None):
    """drop_rate: p, up to 127/128; None takes the least that the budget allows."""
    seeds = {name: context.seed_of(name) for name in delta}
    counts = {name: _counts(seeds[name], x.numel()) for name, x in delta.items()}

    def cost(count):
        rate = FIRST - 1 + count
        return context.cost_of(
            {n: _spec(context.shapes[n], int(counts[n][rate - 1]), seeds[n], rate) for n in counts}
        )

    rate = _largest(context, cost, drop_rate)
    return {
        name: seeded_sparse(x * (PARTS / rate), seeds[name], rate * (WHOLE // PARTS))
        for name, x in delta.items()
    }


def _largest(context, cost, drop_rate):
    given = None if drop_rate is None else max(1, round((1 - drop_rate) * PARTS) - FIRST + 1)
    most = PARTS - FIRST + 1
    one = "one entry in 128, each with 16 bits"
    name = "dare's rate of kept entries, in 65536ths from 512 on,"
    return FIRST - 1 + largest_within(context.budget, cost, most, one, given, name)


def _counts(seed, numel):
    """int64 (PARTS,): how many elements are kept at each rate from 1 on."""
    found = np.zeros(PARTS, np.int64)
    for _, drawn in draws(seed, numel):
        # the upper 16 of 48 bits
        found += np.bincount((drawn >> np.uint64(32)).astype(np.int64), minlength=PARTS)
    return found.cumsum()


def _spec(shape, count, seed, rate):
    return seeded_sparse_spec(shape, count, seed, rate * (WHOLE // PARTS))
