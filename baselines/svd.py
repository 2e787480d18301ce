"""Plain SVD of every matrix of the delta, the factors in 16 bit ("SVD" in figures 7 and 8 of arXiv 2505.18502)."""

from cl_graft.ranges import Count
from cl_graft.strategy import compressor
from cl_graft.strategy.low_rank import largest_rank, truncated


def largest(context, *, rank: int | None) -> int:
    """The rank asked for if it is possible, or the largest that the budget holds."""
    return largest_rank(context, rank, "svd.rank")


@compressor(keeps="per_task", check=largest)
def svd(delta, context, *, rank: Count | None = None):
    """rank: one for all matrices, embeddings and head included, as the storage in the paper's figures has it; a
    matrix whose factors would be no smaller than itself is kept whole, as vectors are. None takes the largest that
    the budget holds.
    """
    chosen = largest(context, rank=rank)
    return {name: truncated(x, chosen) for name, x in delta.items()}
