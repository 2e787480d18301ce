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

import numpy as np
import torch
from torch import Tensor

from cl_graft.skillpack.threads import in_threads

NARROW = (torch.bfloat16, torch.float16)
# entries at a time on the CPU: fewer take less time than the calls do, more fall out of its cache
CHUNK = 1 << 17
GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# of Knuth's multiplicative hashing, as an int32: a prime near 2**32 over the golden ratio
HASH = 0x9E3779B1 - (1 << 32)
WORTH_COMPILING = 1 << 20  # entries: loading what is compiled takes as long as millions of them
SMALLEST_NORMAL = 2.0**-14  # of float16


def seed_of(packs: Sequence[str], name: str) -> int:
    """The seed, 64 bits, of a parameter under packs: their base's fingerprint and their tasks, in order."""
    text = json.dumps([*packs, name]).encode()
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def stochastic(x: Tensor, dtype: torch.dtype, seed: int, at: int | Tensor = 0) -> Tensor:
    """Round float32 entries to one of both neighbours in bfloat16 or float16, the error's mean being zero.

    The probability of the one farther from zero is exact to 2**-16 of the spacing in bfloat16, 2**-13 in float16. What
    the dtype holds stays as it is, -0 and infinities too; NaN stays NaN; what is beyond the largest finite value is
    rounded to nearest, so that no overflow depends on chance.

    x: any shape. at: row-major position of its first entry in the tensor that it is a part of, or int64 of its shape,
    that of each: the parts of a tensor, rounded one by one, are the parts of the whole rounded at once. Raises
    ValueError for another dtype.
    """
    if x.dtype != torch.float32 or dtype not in NARROW:
        raise ValueError(
            f"{x.dtype} is not rounded to {dtype}; pass float32 and a dtype of 16 bits."
        )
    flat, out = x.contiguous().view(-1), torch.empty(x.numel(), dtype=dtype, device=x.device)
    first = 0 if isinstance(at, Tensor) else at
    places = at.reshape(-1) if isinstance(at, Tensor) else None
    step = CHUNK if x.device.type == "cpu" else max(1, x.numel())
    largest = torch.finfo(dtype).max
    for start in range(0, len(flat), step):
        part = flat[start : start + step]
        if places is None:
            bits = random_bits(len(part), seed, first + start, x.device)
        else:
            bits = random_bits_at(places[start : start + step], seed)
        mine = _rounded(part, dtype, bits)
        least, most = part.aminmax()
        if not (-largest <= least and most <= largest):  # nor where either is NaN
            mine = torch.where(part.abs() <= largest, mine, part.to(dtype))
        out[start : start + step] = mine
    return out.view(x.shape)


def dithered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 entries to bfloat16 or float16 as `stochastic` does, by random bits that are a hash of the entry.

    Equal entries are rounded alike, so the result does not depend on what else is in the tensor. The mean error is zero
    over entries that differ, as a layer's outputs do. x: any shape, finite.
    """
    flat = x.contiguous().view(-1)
    bits = (flat.view(torch.int32) * HASH).bitwise_right_shift_(16).bitwise_and_(0xFFFF)
    return _rounded(flat, dtype, bits).view(x.shape)


def summed(x: Tensor, dtype: torch.dtype, seed: int, at: int | Tensor = 0) -> Tensor:
    """A sum with a delta (float32 or float64) in `dtype`: by `stochastic` where that has 16 bits."""
    return stochastic(x.float(), dtype, seed, at) if dtype in NARROW else x.to(dtype)


def add(weight: Tensor, delta: Tensor, seed: int, at: int | Tensor = 0) -> None:
    """weight += delta (float32, on its device), in place: summed in float32, or in weight's wider dtype; `summed`."""
    if weight.dtype in NARROW:
        weight.copy_(stochastic(weight.float().add_(delta), weight.dtype, seed, at))
    else:
        weight.add_(delta)


def total(base: Tensor, delta: Tensor, out: Tensor, seed: int, first: int = 0) -> bool:
    """out = base + delta, rounded as `add` does; whether all of it is finite.

    base, out: of one dtype, in memory of their own; delta: of any; all of one shape and device. first: row-major
    position of the first entry in the tensor that they are a part of. In one pass over memory where all are bfloat16
    and many.
    """
    if out.dtype not in NARROW or out.device.type != "cpu":
        if out.dtype in NARROW:
            out.copy_(stochastic(base.float().add_(delta), out.dtype, seed, first))
        else:
            torch.add(base, delta, out=out)
        return all_finite(out)
    flat = [x.detach().contiguous().view(-1) for x in (base, delta, out)]
    narrow = all(x.dtype == torch.bfloat16 for x in flat) and first % 4 == 0
    add_ = _add_compiled if narrow and out.numel() >= WORTH_COMPILING else _add_chunks
    finite = []

    def run(part: slice) -> None:
        finite.append(add_([x[part] for x in flat], seed, first + part.start))

    if add_ is _add_compiled:
        in_threads(run, out.numel(), 4, CHUNK)
    else:  # torch's own operations have threads of their own
        run(slice(0, out.numel()))
    if not out.is_contiguous():
        out.copy_(flat[2].view(out.shape))
    return all(finite)


def _add_chunks(flat: Sequence[Tensor], seed: int, first: int) -> bool:
    base, delta, out = flat
    finite = True
    for start in range(0, len(out), CHUNK):
        part = slice(start, start + CHUNK)
        sums = base[part].float().add_(delta[part])
        out[part] = stochastic(sums, out.dtype, seed, first + start)
        finite = finite and all_finite(out[part])
    return finite


def _add_compiled(flat: Sequence[Tensor], seed: int, first: int) -> bool:
    from cl_graft.skillpack import compiled

    bits = [x.view(torch.uint16).numpy() for x in flat]
    largest = compiled.add(*bits, np.uint64(seed), np.uint64(first // 4))
    # what chance must not decide is rare, and decided anew
    return largest <= compiled.LARGEST or _add_chunks(flat, seed, first)


def all_finite(x: Tensor) -> bool:
    """Whether no entry is NaN or infinite: where one is, so is the sum, which takes one fast pass.

    Without a temporary of the tensor's size.
    """
    if torch.isfinite(x.sum()):
        return True
    return all(bool(torch.isfinite(part).all()) for part in x.reshape(-1).split(CHUNK))


def neighbours(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two values of bfloat16 or float16 around each float32 entry, as float32: that nearer to zero, the other.

    Both are the entry where the dtype holds it. Entries are finite; what is beyond the largest finite value has an
    infinity for a neighbour.
    """
    near = x.to(dtype)
    low = torch.where(near.abs() > x.abs(), _next(near, -1), near)
    high = torch.where(low.float() == x, low, _next(low, 1)).float()
    return low.float(), high


def _next(x: Tensor, step: int) -> Tensor:
    """The value that is a step farther from zero (1) or nearer to it (-1), by the bits, which count magnitudes."""
    return (x.view(torch.int16) + step).view(x.dtype)


def random_bits(count: int, seed: int, first: int, device: torch.device) -> Tensor:
    """16 random bits for each of the positions first, ..., first + count - 1: int32 (count,), 0 to 65535.

    One number of SplitMix64 serves four positions, its lowest bits the first.
    """
    start, stop = first // 4, (first + count + 3) // 4
    words = _splitmix(torch.arange(start, stop, dtype=torch.int64, device=device), seed)
    halves = words.view(torch.int16)[first - 4 * start :][:count]  # of a little-endian machine
    return halves.to(torch.int32).bitwise_and_(0xFFFF)


def random_bits_at(positions: Tensor, seed: int) -> Tensor:
    """16 random bits for each of the positions (count,), int64 and in any order: those of `random_bits`."""
    words = _splitmix(positions >> 2, seed)
    return (words >> 16 * (positions & 3)).bitwise_and_(0xFFFF).to(torch.int32)


def _splitmix(numbers: Tensor, seed: int) -> Tensor:
    """Outputs of SplitMix64 by their number from 0, int64, in place; int64 shifts draw ones in, hence the masks."""
    z = numbers.add_(1).mul_(_signed(GAMMA)).add_(_signed(seed))
    for shift, factor in ((30, FIRST), (27, SECOND)):
        z.bitwise_xor_((z >> shift).bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))
    return z.bitwise_xor_((z >> 31).bitwise_and_((1 << 33) - 1))


def _rounded(x: Tensor, dtype: torch.dtype, bits: Tensor) -> Tensor:
    return _to_bfloat16(x, bits) if dtype == torch.bfloat16 else _to_float16(x, bits)


def _to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """The upper half of a float32 is a bfloat16, and the lower half how far it is to the next, in 2**-16 of the way."""
    whole = bits.add_(x.view(torch.int32)).bitwise_right_shift_(16)
    return whole.to(torch.int16).view(torch.bfloat16)


def _to_float16(x: Tensor, bits: Tensor) -> Tensor:
    """Round as to bfloat16, but by the 13 bits that float16 has less; below its normal numbers the spacing is that of
    the smallest ones, so entries are brought there by adding it and back again."""
    shift = (x.abs() < SMALLEST_NORMAL).to(x.dtype).mul_(SMALLEST_NORMAL).copysign_(x)
    whole = bits.bitwise_and_(0x1FFF).add_((x + shift).view(torch.int32)).bitwise_and_(~0x1FFF)
    return whole.view(torch.float32).sub_(shift).copysign_(x).to(torch.float16)


def _signed(value: int) -> int:
    """The int64 of the same 64 bits."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


# under the second moments of what a layer reads

REACH = 3  # spacings beyond its two neighbours that an entry goes to make up for others


def compensated(
    x: Tensor,
    dtype: torch.dtype,
    hessian: Tensor,
    seed: int,
    *,
    damping: float = 0.1,
    block: int = 128,
) -> Tensor:
    """Round a matrix so that its outputs change least: columns in turn, each making up for those before it.

    GPTQ (Frantar et al. 2023, arXiv 2210.17323) on the grid of bfloat16 or float16, whose spacing is each entry's own,
    with stochastic rounding (Chee et al. 2023, arXiv 2307.13304): no entry's error has a direction. Rounded to nearest,
    the outputs' error would be smaller still, but all of it away from the delta, in every layer.

    x: float32 (rows, cols), finite, of a layer that computes x @ input. hessian: (cols, cols), X^T X / n of its inputs,
    of any scale. damping: share of the mean diagonal added to it, and more where it takes more. Columns go by falling
    diagonal. What the dtype holds stays as it is; see `in_reach` for the others. Raises ValueError for shapes that do
    not fit, and where the Hessian is far from positive semi-definite.
    """
    if x.dtype != torch.float32 or dtype not in NARROW or hessian.shape != (x.shape[-1],) * 2:
        raise ValueError(
            f"{x.dtype} {tuple(x.shape)} is not rounded to {dtype} under {tuple(hessian.shape)} moments; pass a "
            "float32 matrix and the second moments of its inputs."
        )
    order = hessian.diagonal().argsort(descending=True, stable=True)
    root = _root(hessian[order][:, order], damping)
    columns = x.T[order]  # (cols, rows), so that a column is contiguous
    low, high = neighbours(columns, dtype)
    room = (high - low).abs().mul_(REACH)
    first, last = torch.minimum(low, high) - room, torch.maximum(low, high) + room
    firsts = torch.arange(len(x), device=x.device) * x.shape[1]  # of each row
    values, missing, terms = low, torch.empty_like(columns), torch.zeros_like(columns)
    for start in range(0, len(columns), block):
        inner, mine = root[start : start + block, start : start + block], missing[start:][:block]
        for i, j in enumerate(range(start, start + len(mine))):
            left = terms[j] + inner[:i, i] @ mine[:i] if i else terms[j]
            best = torch.add(columns[j], left, alpha=1 / float(inner[i, i]))
            best = torch.minimum(torch.maximum(best, first[j]), last[j])
            moved = stochastic(best, dtype, seed, firsts + order[j]).float()
            values[j] = torch.where(room[j] > 0, moved, low[j])
            torch.sub(columns[j], values[j], out=mine[i])
        terms[start + block :].addmm_(root[start : start + block, start + block :].T, mine)
    return values[order.argsort()].T.contiguous().to(dtype)


def in_reach(rounded: Tensor, x: Tensor) -> Tensor:
    """Whether each entry is where `compensated` may have put that of x (float32): bool, of their shape."""
    low, high = neighbours(x, rounded.dtype)
    # the next of another exponent is up to a wider spacing beyond
    return (rounded.float() - x).abs() <= (REACH + 3) * (high - low).abs()


def _root(hessian: Tensor, damping: float) -> Tensor:
    """R (cols, cols), float32, upper triangular, R R^T = the Hessian + damping: sum_j |sum_(i<=j) D_i R_ij|^2 is the
    error of the outputs, so that a column can make up for all before it in its own term."""
    mean = float(hessian.diagonal().double().abs().mean()) or 1.0
    for more in (1.0, 5.0):  # sums in float32 are a little off being positive semi-definite
        damped = hessian.to(torch.float64, copy=True).div_(mean)
        damped.diagonal().add_(more * damping)
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not failed and lower.isfinite().all():
            return lower.flip(0, 1).float()
    raise ValueError("the second moments are far from positive semi-definite; pass X^T X / n.")
