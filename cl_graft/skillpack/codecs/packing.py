"""Bit packing: small integers, the positions of a sparse tensor's values, and quantised matrices.

A stream of width 1 to 8 holds value `i` in bits `i * width .. (i + 1) * width - 1`, the lowest bit
of byte 0 first. Wider values are cut into planes: the low bytes of all, then what is left of all.
The bits that fill up the last byte are zero, so a list of values has exactly one packing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cl_graft.skillpack.codecs.quant import BITS, Quantized, groups_in

MAX_WIDTH = 48
TILE = 1 << 13  # words unpacked at a time: they stay in a core's cache
EXPONENTS = range(-126, 118)  # of Quantized


def packed_bytes(count: int, width: int) -> int:
    """Bytes that `count` values of `width` bits take."""
    return -(-count * width // 8)


def pack(values: Tensor, width: int) -> Tensor:
    """Pack integers in `[0, 2**width)`.

    values: uint8 or int64, any shape, read in row-major order; width: 1 to 48 bits.
    Returns uint8 (packed_bytes(values.numel(), width),). Raises ValueError for a value too large.
    """
    flat = values.detach().cpu().reshape(-1)
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"a width of {width} bits is not between 1 and {MAX_WIDTH}.")
    if flat.numel() and (int(flat.max()) >> width or int(flat.min()) < 0):
        raise ValueError(f"a value does not fit in {width} bits.")
    if width > 8:
        wide = flat.long()
        return torch.cat([(wide & 255).to(torch.uint8), pack(wide >> 8, width - 8)])
    if width == 8:
        return flat.to(torch.uint8, copy=True)
    eights = np.zeros((-(-flat.numel() // 8), 8), dtype=np.uint8)
    eights.reshape(-1)[: flat.numel()] = flat.numpy()
    words = np.zeros(len(eights), dtype="<u8")  # eight values of `width` bits fill `width` bytes
    for i in range(8):
        words |= eights[:, i].astype("<u8") << np.uint64(i * width)
    packed = words.view(np.uint8).reshape(-1, 8)[:, :width].reshape(-1)
    return torch.from_numpy(packed[: packed_bytes(flat.numel(), width)].copy())


def unpack(packed: Tensor, count: int, width: int) -> Tensor:
    """The inverse of `pack`: (count,), uint8 for widths up to 8, else int64.

    Raises ValueError where `packed` is not the one packing of `count` values.
    """
    check_packed(packed, count, width)
    if width > 8:
        return packed[:count].long() | (unpack(packed[count:], count, width - 8).long() << 8)
    return unpack_part(packed, 0, count, width)


def unpack_part(packed: Tensor, first: int, count: int, width: int) -> Tensor:
    """Values `first` to `first + count` of a stream of 1 to 8 bits a value that was checked: uint8."""
    if width == 8:
        return packed[first : first + count].clone()
    skip, eights = first % 8, -(-(first % 8 + count) // 8)  # eight values fill `width` whole bytes
    taken = packed[first // 8 * width :][: eights * width].numpy()
    padded = np.empty(eights * width + 8, dtype=np.uint8)  # a word is read 8 bytes at a time
    padded[: len(taken)] = taken
    padded[len(taken) :] = 0
    starts = np.ndarray((eights,), "<u8", padded, strides=(width,))
    words = np.empty(eights, dtype="<u8")
    for tile in range(0, eights, TILE):
        _spread(starts[tile : tile + TILE], words[tile : tile + TILE], width)
    return torch.from_numpy(words.view(np.uint8)[skip : skip + count])


def _spread(starts: np.ndarray, words: np.ndarray, width: int) -> None:
    """The lowest 8 values of `width` bits in each of `starts`, one to a byte of each of `words`.

    Eight values are parted into two halves of a word, each half into two quarters, those into bytes.
    """
    np.bitwise_and(starts, np.uint64((1 << 8 * width) - 1), out=words)
    moved = np.empty_like(words)
    for values in (4, 2, 1):
        field = (1 << width * values) - 1
        low = sum(field << at for at in range(0, 64, 16 * values))
        np.left_shift(words, np.uint64((8 - width) * values), out=moved)
        if width > 4:  # the halves still lie across each other
            words &= np.uint64(low)
            moved &= np.uint64(low << 8 * values)
        words |= moved
        words &= np.uint64(low | low << 8 * values)


def check_packed(packed: Tensor, count: int, width: int) -> None:
    """Raise ValueError unless `packed` is as long as `count` values need and ends in zero bits."""
    if packed.numel() != packed_bytes(count, width):
        raise ValueError(f"{packed.numel()} bytes cannot hold {count} values of {width} bits.")
    used = count * width % 8
    if used and int(packed[-1]) >> used:
        raise ValueError("the bits after the last packed value are not zero.")


def _gaps(positions: Tensor) -> Tensor:
    """How many elements lie between each position and the one before it."""
    return torch.diff(positions, prepend=positions.new_full((1,), -1)) - 1


def gap_code(positions: Tensor, width: int) -> Tensor:
    """Tokens of `width` bits for strictly increasing positions, int64.

    A token below `2**width - 1` skips that many places and marks the next one; the token
    `2**width - 1` only skips that many, so a long gap costs a few tokens more, never a wider code.
    """
    escape = (1 << width) - 1
    gaps = _gaps(positions)
    escapes = gaps // escape
    tokens = torch.full((positions.numel() + int(escapes.sum()),), escape, dtype=torch.int64)
    tokens[torch.cumsum(escapes + 1, 0) - 1] = gaps % escape
    return tokens


def gap_decode(tokens: Tensor, width: int, numel: int) -> Tensor:
    """The inverse of `gap_code`: strictly increasing positions below `numel`, int64.

    Raises ValueError for a position out of range or a skip that leads nowhere.
    """
    tokens = tokens.long()
    marks = tokens != (1 << width) - 1
    if tokens.numel() and not marks[-1]:
        raise ValueError("the index ends in a skip that leads to no position.")
    steps = tokens + marks
    if float(steps.sum(dtype=torch.float64)) > numel:  # in floats, for no sum can wrap around there
        raise ValueError(f"the index points past the last of {numel} elements.")
    return (torch.cumsum(steps, 0) - 1)[marks]


def best_gap(positions: Tensor, numel: int) -> tuple[int, int]:
    """(width, tokens) of the shortest gap code of these positions among `numel` elements."""
    gaps = _gaps(positions)
    widths = range(1, max(1, numel.bit_length()) + 1)
    counts = [gaps.numel() + int((gaps // ((1 << width) - 1)).sum()) for width in widths]
    return min(zip(widths, counts, strict=True), key=lambda pair: pair[0] * pair[1])


def pack_index(positions: Tensor, numel: int) -> tuple[list[int] | None, Tensor]:
    """(gap, index): the shorter of a gap code, gap = [width, tokens], and a bitmap, gap = None."""
    width, tokens = best_gap(positions, numel)
    if packed_bytes(tokens, width) < packed_bytes(numel, 1):
        return [width, tokens], pack(gap_code(positions, width), width)
    bitmap = torch.zeros(numel, dtype=torch.uint8)
    bitmap[positions] = 1
    return None, pack(bitmap, 1)


def gap_bytes(gap: object, numel: int) -> int:
    """Bytes of the gap code that a header's `gap` = [width, tokens] says, among `numel` elements. Raises ValueError."""
    if not isinstance(gap, list) or len(gap) != 2 or any(type(g) is not int for g in gap):
        raise ValueError("gap is not a list of 2 numbers.")
    width, tokens = gap
    # each token goes one place on or more
    if not 1 <= width <= MAX_WIDTH or not 0 <= tokens <= numel:
        raise ValueError(f"gap: a width of 1 to {MAX_WIDTH} and 0 to {numel} tokens are possible.")
    return packed_bytes(tokens, width)


def unpack_index(index: Tensor, gap: list[int] | None, numel: int) -> Tensor:
    """The inverse of `pack_index`: int64, strictly increasing. Raises ValueError on a bad index."""
    if gap is None:
        return unpack(index, numel, 1).nonzero().reshape(-1)
    width, tokens = gap
    return gap_decode(unpack(index, tokens, width), width, numel)


class Grid(NamedTuple):
    """How a quantised matrix (rows, cols) is packed: a byte of exponent, then codes and zeros."""

    rows: int
    cols: int
    bits: int
    group_size: int

    @property
    def groups(self) -> tuple[int, int]:
        """The shape of its scales and of its zeros."""
        return self.rows, groups_in(self.cols, self.group_size)

    @property
    def scales(self) -> int:
        return math.prod(self.groups)

    @property
    def values(self) -> int:
        return self.rows * self.cols + self.scales

    @property
    def bytes(self) -> int:
        return 1 + packed_bytes(self.values, self.bits)


def grid_of(q: Quantized) -> Grid:
    """The grid of a quantised matrix. Raises ValueError where its tensors do not fit together."""
    if q.codes.ndim != 2 or q.bits not in BITS or q.group_size < 1:
        raise ValueError(f"{q.codes.ndim}-d codes, {q.bits} bits, groups of {q.group_size}.")
    grid = Grid(q.codes.shape[0], q.codes.shape[1], q.bits, q.group_size)
    if tuple(q.scale.shape) != grid.groups or tuple(q.zero.shape) != grid.groups:
        raise ValueError(f"scale and zero must have shape {grid.groups} to go with the codes.")
    return grid


def pack_quantized(q: Quantized) -> Tensor:
    """Pack all but the scales, as uint8 (grid_of(q).bytes,). Raises ValueError on codes beyond the bits.

    The exponent is a byte, not a number in a header, so that no size depends on the data.
    """
    grid_of(q)
    if q.exponent not in EXPONENTS:
        raise ValueError(f"exponent {q.exponent} is not in [{EXPONENTS[0]}, {EXPONENTS[-1]}].")
    exponent = torch.tensor([q.exponent], dtype=torch.int8).view(torch.uint8)
    stream = torch.cat([q.codes.reshape(-1), q.zero.reshape(-1)])
    return torch.cat([exponent, pack(stream, q.bits)])


def check_quantized(packed: Tensor, grid: Grid) -> None:
    """Raise ValueError unless `packed` is what `pack_quantized` makes of some matrix."""
    check_packed(packed[1:], grid.values, grid.bits)
    if int(packed[0].view(torch.int8)) not in EXPONENTS:
        raise ValueError(f"an exponent is not in [{EXPONENTS[0]}, {EXPONENTS[-1]}].")


def unpack_quantized(packed: Tensor, scales: Tensor, grid: Grid) -> Quantized:
    """The inverse of `pack_quantized`. scales: float16 (grid.scales,)."""
    stream = unpack(packed[1:], grid.values, grid.bits)
    codes, zero = stream.split([grid.rows * grid.cols, grid.scales])
    return Quantized(
        codes.reshape(grid.rows, grid.cols),
        scales.reshape(grid.groups),
        zero.reshape(grid.groups),
        grid.bits,
        grid.group_size,
        int(packed[0].view(torch.int8)),
    )
