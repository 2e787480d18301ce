"""Deltas as factors of one rank, 16 bits a number, and the largest rank that a budget holds."""

from __future__ import annotations

from math import prod

from torch import Tensor

from cl_graft.budget import largest_within
from cl_graft.skillpack.codecs import Encoded, Spec, dense, dense_spec, low_rank, low_rank_spec
from cl_graft.skillpack.compress.factorise import spectrum
from cl_graft.strategy.context import Context

Shape = tuple[int, ...]


def largest_rank(context: Context, rank: int | None, name: str) -> int:
    """The rank asked for by the option `name`, if it is possible, or the largest that the budget holds.

    Raises OverBudget or CLGraftError, as `largest_within` does.
    """

    def cost(rank: int) -> int:
        return context.cost_of({n: _spec(shape, rank) for n, shape in context.shapes.items()})

    most = max(min(shape) for shape in context.shapes.values() if len(shape) == 2)
    return largest_within(context.budget, cost, most, "rank 1 of every matrix", rank, name)


def truncated(x: Tensor, rank: int) -> Encoded:
    """The best approximation of a matrix of this rank; whole where that is no smaller, as of a vector."""
    if not _is_smaller(tuple(x.shape), rank):
        return dense(x)
    factors = spectrum(x, None)
    return low_rank(factors.left(x, None, rank), factors.right(x, rank))


def _is_smaller(shape: Shape, rank: int) -> bool:
    return len(shape) == 2 and rank * sum(shape) < prod(shape)


def _spec(shape: Shape, rank: int) -> Spec:
    return low_rank_spec(shape, rank) if _is_smaller(shape, rank) else dense_spec(shape)
