"""LoRAQuant: the first singular directions at 2 bits, the others by signs (Mirzaei et al. 2025, arXiv 2510.26690).

D = U S V^T becomes (U S^1/2) (S^1/2 V^T). The first ranks, up to `ratio` of the squared singular values of those kept,
are rounded to the nearest on min-max grids, the others become their sign times the mean magnitude, all in groups along
the outputs and along the inputs. The paper does so to trained LoRA factors, whose rank is given; here a full delta is
cut at the largest rank that the budget holds, one for all matrices, embeddings and head included. Its gradient steps on
the factors, which lower the quantised product's error before they are rounded, are left out. Vectors are kept in 16
bit.
"""

from typing import Annotated, Literal

from cl_graft.budget import largest_within
from cl_graft.ranges import Count, Part, Strength
from cl_graft.skillpack.codecs import dense, dense_spec, sign_low_rank, sign_low_rank_spec
from cl_graft.skillpack.codecs.quant import round_to_nearest
from cl_graft.skillpack.compress.factorise import rank_for_energy, spectrum
from cl_graft.skillpack.compress.singular import singular
from cl_graft.strategy import compressor


def least(context, *, rank: int | None, bits: int, group_size: int) -> int:
    """The rank asked for if it is possible, or the largest that the budget holds where all but the first are signs."""

    def spec(shape, rank):
        return _spec(shape, 1, min(rank, *shape) - 1, bits, group_size)

    return _largest(context, lambda name, shape, rank: spec(shape, rank), rank)


@compressor(keeps="per_task", check=least)
def loraquant(
    delta,
    context,
    *,
    ratio: Annotated[Part, Strength(0.5, 0.7, 0.8, 0.9, 0.95)] = 0.9,
    rank: Count | None = None,
    bits: Literal[2, 3] = 2,
    group_size: Count = 128,
):
    """ratio: the paper's rho. rank: one for all matrices; None takes the largest that the budget holds. bits: of the
    first ranks.
    """
    spectra = {name: spectrum(x, None) for name, x in delta.items() if x.ndim == 2}

    def split(name, rank):
        """Ranks on the grid, and ranks by signs."""
        energy = spectra[name].energy[:rank]
        high = max(1, rank_for_energy(energy, ratio))
        return high, len(energy) - high

    def spec(name, shape, rank):
        return _spec(shape, *split(name, rank), bits, group_size)

    chosen = _largest(context, spec, rank)

    def encoded(name, x):
        if x.ndim != 2:
            return dense(x)
        high, low = split(name, chosen)
        left, right = singular(x, spectra[name], high + low)
        root = right.norm(dim=1).sqrt()[:, None].clamp_min(1e-30)
        factors = left.T * root, right / root
        sizes = [min(group_size, f.shape[1]) for f in factors]
        grids = [
            round_to_nearest(f[:high].contiguous(), bits, size, search=False)
            for f, size in zip(factors, sizes, strict=True)
        ]
        return sign_low_rank(grids, [f[high:] for f in factors], group_size)

    return {name: encoded(name, x) for name, x in delta.items()}


def _largest(context, spec, given):
    def cost(rank):
        specs = {
            name: spec(name, shape, rank) if len(shape) == 2 else dense_spec(shape)
            for name, shape in context.shapes.items()
        }
        return context.cost_of(specs)

    most = max(min(shape) for shape in context.shapes.values() if len(shape) == 2)
    return largest_within(
        context.budget, cost, most, "rank 1 of every matrix", given, "loraquant.rank"
    )


def _spec(shape, high, low, bits, group_size):
    grid = [high, bits, *(min(group_size, size) for size in shape)]
    return sign_low_rank_spec(shape, grid, [low, group_size, group_size])
