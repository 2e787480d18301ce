"""Fast decoding: the factors of a low-rank delta, laid out for the product, and single rows of a delta.

`codecs.decode` is the reference. What is here gives the same numbers (in float32 the very same factors)
without ever holding the delta of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded, packing
from cl_graft.skillpack.codecs.packing import Grid

LOW_RANK = ("low_rank", "quantized_low_rank")
STRIP = 64  # ranks dequantised at a time: they stay in a core's cache until they are in place

Factors = tuple[Tensor, Tensor]


def rank_of(encoded: Encoded) -> int | None:
    """Of the factors that a codec stores; None where it stores none."""
    if encoded.codec == "quantized_low_rank":
        return sum(group[0] for group in encoded.meta["groups"])
    return encoded.meta.get("rank")


def factors(parts: Sequence[Encoded], dtype: torch.dtype = torch.float32) -> Factors:
    """(left (rows, r), right (r, cols)), contiguous: left @ right is the sum of the deltas of `parts`.

    parts: one or more of LOW_RANK codecs and one shape; r is the sum of their ranks. dtype: what every
    entry, computed in float32, is rounded to, once. Raises ValueError as `codecs.check` does.
    """
    for encoded in parts:
        codecs.check(encoded)
    (rows, cols), ranks = parts[0].shape, [rank_of(encoded) or 0 for encoded in parts]
    rank = sum(ranks)
    left, right = torch.empty(rows, rank, dtype=dtype), torch.empty(rank, cols, dtype=dtype)
    first = 0
    for encoded, count in zip(parts, ranks, strict=True):
        mine = slice(first, first + count)
        if encoded.codec == "low_rank":
            left[:, mine] = encoded.parts["left"]
            right[mine] = encoded.parts["right"]
        else:
            _dequantize(encoded, left[:, mine].T, right[mine])
        first = mine.stop
    return left, right


def sparse_entries(encoded: Encoded) -> Factors:
    """(positions int64 (kept,), strictly increasing, row-major; values (kept,)) of a sparse delta.

    Raises ValueError as `codecs.check` does.
    """
    codecs.check_parts(encoded)
    return codecs.sparse_positions(encoded), encoded.parts["values"]


def sparse_rows(entries: Factors, cols: int, ids: Tensor) -> Tensor:
    """Rows `ids` (n,) of the matrix of `cols` columns with these sparse entries: float32 (n, cols)."""
    positions, values = entries
    starts = torch.searchsorted(positions, ids * cols)
    counts = torch.searchsorted(positions, (ids + 1) * cols) - starts
    row = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
    ends = counts.cumsum(0)
    entry = torch.arange(len(row), device=ids.device) + (starts - ends + counts)[row]
    found = torch.zeros(len(ids), cols, device=ids.device)
    found[row, positions[entry] % cols] = values[entry].float()
    return found


def _dequantize(encoded: Encoded, left: Tensor, right: Tensor) -> None:
    """Into left (r, rows), of any strides, and right (r, cols)."""
    codes, scales, first = encoded.parts["codes"], encoded.parts["scales"], 0
    for rank, bits, *sizes in encoded.meta["groups"]:
        for out, size in zip((left, right), sizes, strict=True):
            grid = Grid(rank, out.shape[1], bits, size)
            _fill(out[first : first + rank], codes[: grid.bytes], scales[: grid.scales], grid)
            codes, scales = codes[grid.bytes :], scales[grid.scales :]
        first += rank


def _fill(out: Tensor, packed: Tensor, scales: Tensor, grid: Grid) -> None:
    """One matrix, a strip of rows at a time, with the operations of `Quantized.dequantize`."""
    stream, codes = packed[1:], grid.rows * grid.cols
    zero = packing.unpack_part(stream, codes, grid.scales, grid.bits).view(grid.groups).float()
    scale = scales.view(grid.groups).float() * 2.0 ** int(packed[0].view(torch.int8))
    room = torch.empty(min(STRIP, grid.rows), grid.cols)
    for first in range(0, grid.rows, STRIP):
        ranks = slice(first, first + STRIP)
        target = out[ranks]
        strip = packing.unpack_part(stream, first * grid.cols, target.numel(), grid.bits)
        values = room[: len(target)].copy_(strip.view(target.shape))
        _scale(values, zero[ranks], scale[ranks], grid.group_size)
        straight = target.is_contiguous()  # else narrowed first: that halves what is strewn
        target.copy_(values if straight else values.to(out.dtype))


def _scale(values: Tensor, zero: Tensor, scale: Tensor, size: int) -> None:
    """values = scale * (values - zero), each group of `size` columns by its own; the last may be shorter."""
    whole = values.shape[1] // size * size
    for columns, groups in (
        (slice(0, whole), slice(0, whole // size)),
        (slice(whole, None), slice(whole // size, None)),
    ):
        if values[:, columns].numel():
            grouped = values[:, columns].unflatten(1, (zero[:, groups].shape[1], -1))
            grouped.sub_(zero[:, groups, None]).mul_(scale[:, groups, None])
