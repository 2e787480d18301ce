"""What rounding.py does in a dozen passes over memory, in one: loops that numba compiles.

The numbers are the same to the last bit. Imported and called for large tensors only:
compiling takes seconds, once on a machine, for numba keeps it beside this file or in the user's cache.
"""

from __future__ import annotations

import numpy as np
from numba import njit

u16, u32, u64, f32 = np.uint16, np.uint32, np.uint64, np.float32
# of SplitMix64
GAMMA, FIRST, SECOND = u64(0x9E3779B97F4A7C15), u64(0xBF58476D1CE4E5B9), u64(0x94D049BB133111EB)
LARGEST = u32(0x7F7F0000)  # finite value of bfloat16


@njit
def _word(seed, number):  # type: ignore[no-untyped-def]
    z = seed + (number + u64(1)) * GAMMA
    z = (z ^ (z >> u64(30))) * FIRST
    z = (z ^ (z >> u64(27))) * SECOND
    return z ^ (z >> u64(31))


@njit
def _wide(x):  # type: ignore[no-untyped-def]
    return u32(u32(x) << u32(16)).view(f32)


@njit
def _rounded(bits, word, lane):  # type: ignore[no-untyped-def]
    chance = u32(u32(word >> u64(16 * lane)) & u32(0xFFFF))
    return u16(u32(bits + chance) >> u32(16))


@njit(nogil=True, cache=True)
def add(base, delta, out, seed, first):  # type: ignore[no-untyped-def]
    """out = base + delta, all bfloat16 as uint16 (n,); the largest magnitude of the sums, by the bits of a float32.

    seed: uint64; first: number of the word of random bits that the first four entries take, uint64. Where the largest
    is beyond LARGEST, out is not what it should be.
    """
    largest = u32(0)
    groups = len(out) // 4
    for group in range(groups):
        word = _word(seed, first + u64(group))
        for lane in range(4):
            i = 4 * group + lane
            bits = f32(_wide(base[i]) + _wide(delta[i])).view(u32)
            out[i] = _rounded(bits, word, lane)
            largest = max(largest, u32(bits & u32(0x7FFFFFFF)))
    word = _word(seed, first + u64(groups))
    for lane in range(len(out) - 4 * groups):
        i = 4 * groups + lane
        bits = f32(_wide(base[i]) + _wide(delta[i])).view(u32)
        out[i] = _rounded(bits, word, lane)
        largest = max(largest, u32(bits & u32(0x7FFFFFFF)))
    return largest
