"""What solve.py solves one column or rank after the other, as loops that numba compiles.

Imported and called for matrices on the CPU that are large enough: compiling takes seconds, once on a machine, for numba
keeps it beside this file or in the user's cache. Sums are in another order than torch's.
"""

from __future__ import annotations

import numpy as np
from numba import njit

f32, u32 = np.float32, np.uint32
ZERO, HALF, ONE = f32(0), f32(0.5), f32(1)


@njit(fastmath=True)
def _rounded(x, zone, top):  # type: ignore[no-untyped-def]
    code = min(np.floor(abs(x) + (HALF - zone)), top)
    return code if x >= ZERO else -code


@njit(nogil=True, cache=True, fastmath=True)
def right_block(x, terms, inner, pivots, finer, zone, top, codes, missing, first, last):  # type: ignore[no-untyped-def]
    """Codes of a block of columns, and what they miss, of the rows first to last: see `solve.solve_right`.

    x, terms, codes, missing: float32 (b, rows), a column after the other; inner: (b, b), of column j the factors of
    those before it in its row j; pivots, finer: (b,); zone: (rows,).
    """
    wanted = np.empty(last - first, np.float32)
    for j in range(len(x)):
        for r in range(first, last):
            wanted[r - first] = terms[j, r]
        for i in range(j):
            factor, before = inner[j, i], missing[i]
            for r in range(first, last):
                wanted[r - first] += factor * before[r]
        fine, coarse, share = finer[j], ONE / finer[j], ONE / pivots[j]
        for r in range(first, last):
            code = _rounded((x[j, r] + wanted[r - first] * share) * fine, zone[r], top)
            codes[j, r] = code
            missing[j, r] = x[j, r] - code * coarse


@njit(nogil=True, cache=True, fastmath=True)
def left_block(left, terms, inner, pivots, sizes, step, bit, top, codes, missing, scales):  # type: ignore[no-untyped-def]
    """Codes of a block of ranks, what they miss, and their scales, rank after rank: see `solve.solve_left`.

    left, terms, codes, missing: float32 (b, out); inner: (b, b), of rank j the factors of those before it in its row j;
    pivots, sizes, scales: (b,).
    """
    ranks, width = left.shape
    wanted = np.empty(width, np.float32)
    for j in range(ranks):
        for o in range(width):
            wanted[o] = terms[j, o]
        for i in range(j):
            factor, before = inner[j, i], missing[i]
            for o in range(width):
                wanted[o] += factor * before[o]
        largest, total = ZERO, ZERO
        for o in range(width):
            wanted[o] = left[j, o] + wanted[o] / pivots[j]
            size = abs(wanted[o])
            total += size
            largest = max(largest, size)
        # no finer than its codes can say
        grain = max(step / pivots[j], largest / top)
        m = max(total / (width * grain), f32(1e-4))
        zone = min(-bit * np.log2((np.sqrt(ONE + m * m) - ONE) / m), f32(0.35))
        squares, along = ZERO, ZERO
        for o in range(width):
            code = _rounded(wanted[o] / grain, zone, top)
            codes[j, o] = code
            squares += code * code
            along += code * wanted[o]
        if squares > ZERO:
            scales[j] = _bfloat16(along * (sizes[j] / squares))
        ratio = scales[j] / sizes[j]
        for o in range(width):
            missing[j, o] = left[j, o] - codes[j, o] * ratio


@njit
def _bfloat16(x):  # type: ignore[no-untyped-def]
    """x rounded to the nearest bfloat16, ties to even."""
    bits = f32(x).view(u32)
    up = u32(bits + u32(0x7FFF) + ((bits >> u32(16)) & ONE_BIT))
    return u32(up & u32(0xFFFF0000)).view(f32)


ONE_BIT = u32(1)
