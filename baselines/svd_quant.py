"""SVD of every matrix of the delta, its factors quantised ("SVD+quant" in figures 7 and 8 of arXiv 2505.18502)."""

from typing import Literal

from cl_graft.budget import largest_within
from cl_graft.ranges import Count
from cl_graft.skillpack.codecs import dense, dense_spec
from cl_graft.skillpack.compress.factorise import Factored, encode, spec_of, spectrum
from cl_graft.strategy import compressor


def largest(context, *, rank: int | None, bits: int, group_size: int) -> int:
    """The rank asked for if it is possible, or the largest that the budget holds."""

    def spec(shape: tuple[int, ...], rank: int):
        if len(shape) == 2:
            return spec_of({bits: min(rank, *shape)}, shape, group_size)
        return dense_spec(shape)

    def cost(rank: int) -> int:
        return context.cost_of({name: spec(shape, rank) for name, shape in context.shapes.items()})

    most = max(min(shape) for shape in context.shapes.values() if len(shape) == 2)
    return largest_within(
        context.budget, cost, most, "rank 1 of every matrix", rank, "svd_quant.rank"
    )


@compressor(keeps="per_task", check=largest)
def svd_quant(
    delta,
    context,
    *,
    rank: Count | None = None,
    bits: Literal[2, 3, 4, 5, 6, 8] = 4,
    group_size: Count = 128,
):
    """rank: one for all matrices, embeddings and head included; None takes the largest that the budget holds.
    bits: of every factor, all ranks alike; no data are looked at (right factors are rounded to the nearest, left
    ones by GPTQ under what became of the right ones). Vectors are kept in 16 bit.
    """
    chosen = largest(context, rank=rank, bits=bits, group_size=group_size)

    def encoded(x):
        if x.ndim != 2:
            return dense(x)
        matrix = Factored(x, spectrum(x, None), {bits: min(chosen, *x.shape)})
        return encode([matrix], None, group_size=group_size, aware=False, refit=False)[0]

    return {name: encoded(x) for name, x in delta.items() if x.ndim != 2 or x.any()}
