"""Plain SVD of every matrix of the delta, the factors in 16 bit ("SVD" in figures 7 and 8 of arXiv 2505.18502)."""

from math import prod

from cl_graft.budget import largest_within
from cl_graft.ranges import Count
from cl_graft.skillpack.codecs import dense, dense_spec, low_rank, low_rank_spec
from cl_graft.skillpack.compress.factorise import spectrum
from cl_graft.strategy import compressor


def largest(context, *, rank: int | None) -> int:
    """The rank asked for if it is possible, or the largest that the budget holds."""

    def cost(rank: int) -> int:
        return context.cost_of({name: _spec(shape, rank) for name, shape in context.shapes.items()})

    most = max(min(shape) for shape in context.shapes.values() if len(shape) == 2)
    return largest_within(context.budget, cost, most, "rank 1 of every matrix", rank, "svd.rank")


@compressor(keeps="per_task", check=largest)
def svd(delta, context, *, rank: Count | None = None):
    """rank: one for all matrices, embeddings and head included, as the storage in the paper's figures has it; a
    matrix whose factors would be no smaller than itself is kept whole, as vectors are. None takes the largest that
    the budget holds.
    """
    chosen = largest(context, rank=rank)
    return {name: _encoded(x, chosen) for name, x in delta.items()}


def _is_smaller(shape, rank):
    return len(shape) == 2 and rank * sum(shape) < prod(shape)


def _spec(shape, rank):
    return low_rank_spec(shape, rank) if _is_smaller(shape, rank) else dense_spec(shape)


def _encoded(x, rank):
    if not _is_smaller(x.shape, rank):
        return dense(x)
    factors = spectrum(x, None)
    return low_rank(factors.left(x, None, rank), factors.right(x, rank))
