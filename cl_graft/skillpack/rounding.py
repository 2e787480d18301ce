"""Rounding of float32 sums to bfloat16 and float16 that keeps what was added to a weight.

A delta of tuning is often smaller than half the spacing of bfloat16 around the weight that it is added to. Rounding to
nearest then gives the weight back as it was, and the delta is lost entry by entry. Stochastic rounding takes the upper
of both neighbours with a probability equal to the distance from the lower: the error has mean zero in every entry, and
in a product it averages out (Gupta et al. 2015, arXiv 1502.02551).

Random bits are those of SplitMix64 (Steele, Lea and Flood 2014) at the entry's own position: a counter, not a state, so
that an entry is rounded alike in whatever tile, on whatever device, by however many threads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

NARROW = (torch.bfloat16, torch.float16)
CHUNK = 1 << 15  # entries at a time on the CPU: what is held beside them stays in its cache
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
SMALLEST_NORMAL = 2.0**-14  # of float16


def seed_of(digests: Sequence[str], name: str) -> int:
    """The seed, 64 bits, of a parameter under the sum of these packs, by their digests in order."""
    text = json.dumps([*digests, name]).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def stochastic(x: Tensor, dtype: torch.dtype, seed: int, offset: int = 0) -> Tensor:
    """Round float32 entries to one of both neighbours in bfloat16 or float16, the error's mean being zero.

    The upper one's probability is exact to 2**-16 of the spacing in bfloat16, 2**-13 in float16. What the dtype holds
    stays as it is, -0 and infinities too; NaN stays NaN; what is beyond the largest finite value is rounded to nearest,
    so that no overflow depends on chance.

    x: any shape. offset: row-major position of its first entry in the tensor that it is a part of: the parts of a
    tensor, rounded one by one, are the parts of the whole rounded at once. Raises ValueError for another dtype.
    """
    if x.dtype != torch.float32 or dtype not in NARROW:
        raise ValueError(
            f"{x.dtype} is not rounded to {dtype}; pass float32 and a dtype of 16 bits."
        )
    flat, out = x.contiguous().view(-1), torch.empty(x.numel(), dtype=dtype, device=x.device)
    step = CHUNK if x.device.type == "cpu" else max(1, x.numel())
    rounded = _to_bfloat16 if dtype == torch.bfloat16 else _to_float16
    largest = torch.finfo(dtype).max
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        bits = random_bits(len(part), seed, offset + start, x.device)
        mine = rounded(part, bits)
        least, most = part.aminmax()
        if not (-largest <= least and most <= largest):  # nor where either is NaN
            mine = torch.where(part.abs() <= largest, mine, part.to(dtype))
        out[start : start + step] = mine
    return out.view(x.shape)


def random_bits(count: int, seed: int, offset: int, device: torch.device) -> Tensor:
    """16 random bits for each of the positions offset, ..., offset + count - 1: int32 (count,), 0 to 65535.

    One number of SplitMix64 serves four positions, its lowest bits the first.
    """
    first, last = offset // 4, (offset + count + 3) // 4
    z = torch.arange(first + 1, last + 1, dtype=torch.int64, device=device)
    z.mul_(_signed(GAMMA)).add_(_signed(seed))
    for shift, factor in ((30, FIRST), (27, SECOND)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))
    words = z.view(torch.int16)[offset - 4 * first :][:count]
    return words.to(torch.int32).bitwise_and_(0xFFFF)


def _to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """The upper half of a float32 is a bfloat16, and the lower half how far it is to the next, in 2**-16 of the way."""
    whole = bits.add_(x.view(torch.int32)).bitwise_right_shift_(16)
    return whole.to(torch.int16).view(torch.bfloat16)


def _to_float16(x: Tensor, bits: Tensor) -> Tensor:
    """As in bfloat16, of the 13 bits that float16 has less; below its normal numbers the spacing is that of the
    smallest ones, so entries are brought there by adding it and back again."""
    shift = torch.where(x.abs() < SMALLEST_NORMAL, SMALLEST_NORMAL, 0.0).copysign_(x)
    whole = bits.bitwise_and_(0x1FFF).add_((x + shift).view(torch.int32)).bitwise_and_(~0x1FFF)
    return whole.view(torch.float32).sub_(shift).copysign_(x).to(torch.float16)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
