"""Delta-DCT: patches by their cosine transforms, at bits by importance (Huang et al. 2025, arXiv 2503.06676).

Each matrix is cut into square patches, these are ranked by their L2 norm within the matrix, and quantised after a
DCT-II at the bits of their rank. The paper's sizes and bits could not be found, nor its code: here a patch is 16 x 16;
of those kept a tenth has 4 bits, four tenths 2, half 1, and the others are dropped; how many are kept, the same share
of every matrix, is the most that the budget holds, so that budgets above 1.8 bits an entry are not used up. Each patch
has one scale, fitted by least squares. Vectors are kept in 16 bit. No data are looked at.
"""

from typing import Annotated

from pydantic import Field

from cl_graft.budget import largest_share
from cl_graft.ranges import Part
from cl_graft.skillpack.codecs import dct_patches, dct_patches_spec, dense, dense_spec
from cl_graft.skillpack.codecs.dct_patches import patches_in
from cl_graft.strategy import compressor

BITS = [4, 2, 1, 0]
SHARES = (0.1, 0.5, 1.0)  # of the patches that are kept: up to where each of the bits goes
PARTS = 4096


def largest(context, *, patch: int, density: float | None) -> int:
    """The share of patches asked for, in 1/4096, if it is possible, or the largest that the budget holds."""

    def cost(kept):
        return context.cost_of({n: _spec(s, patch, kept) for n, s in context.shapes.items()})

    one = "one patch in 4096 of every matrix"
    return largest_share(context.budget, cost, PARTS, one, density, "delta_dct.density")


@compressor(keeps="per_task", check=largest)
def delta_dct(
    delta,
    context,
    *,
    patch: Annotated[int, Field(ge=2, le=256)] = 16,
    density: Part | None = None,
):
    """patch: the side of a patch. density: share of the patches that is kept; None takes the largest that the budget
    holds.
    """
    kept = largest(context, patch=patch, density=density)
    return {
        name: dct_patches(x, patch, BITS, _counts(x.shape, patch, kept))
        if x.ndim == 2
        else dense(x)
        for name, x in delta.items()
    }


def _counts(shape, patch, kept):
    """Patches at each of the bits."""
    patches = patches_in(shape, patch)
    ends = [0, *(round(share * kept * patches / PARTS) for share in SHARES), patches]
    return [stop - start for start, stop in zip(ends, ends[1:], strict=False)]


def _spec(shape, patch, kept):
    if len(shape) != 2:
        return dense_spec(shape)
    return dct_patches_spec(shape, patch, BITS, _counts(shape, patch, kept))
