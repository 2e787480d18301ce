"""`quantized_low_rank`: a matrix as a product of group-quantised factors, in rank groups of their own bits.

meta: groups = [[rank, bits, left group size, right group size], ...]; parts: codes, scales (grids.py),
left and right of each rank group in turn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import grids, packing
from cl_graft.skillpack.codecs.codec import Factored, register
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    Spec,
    fields,
    matrix,
    whole,
    wholes,
)
from cl_graft.skillpack.codecs.packing import Grid
from cl_graft.skillpack.codecs.quant import Quantized

# rank groups of one tensor: decoding adds a whole matrix for each
MAX_GROUPS = 64
# ranks dequantised at a time: they stay in a core's cache until they are in place
STRIP = 64


def quantized_low_rank(
    pairs: Sequence[tuple[Quantized, Quantized]], shape: tuple[int, int]
) -> Encoded:
    """delta = sum_k left_k.T @ right_k, the rank group of the highest precision first.

    pairs: left_k (r_k, out) and right_k (r_k, in), both of the same bits; groups run along out and
    in; at most 64 pairs. shape: (out, in). Raises ValueError where shapes, bits or codes do not fit
    together.
    """
    groups = []
    for pair in pairs:
        left, right = (packing.grid_of(factor) for factor in pair)
        if (left.rows, left.cols, right.cols) != (right.rows, *shape):
            shapes = f"({left.rows}, {left.cols}) and ({right.rows}, {right.cols})"
            raise ValueError(f"factors {shapes} are not (r, out) and (r, in) of shape {shape}.")
        if left.bits != right.bits:
            raise ValueError(f"a rank group has {left.bits} bits left, but {right.bits} right.")
        groups.append([left.rows, left.bits, left.group_size, right.group_size])
    whole(len(groups), "the number of rank groups", 0, MAX_GROUPS)
    parts = grids.pack([factor for pair in pairs for factor in pair])
    return Encoded(*quantized_low_rank_spec(tuple(shape), groups), parts)


def quantized_low_rank_spec(shape: tuple[int, ...], groups: list[list[int]]) -> Spec:
    """What `quantized_low_rank` says of such rank groups, before there are any: [rank, bits, left
    group size, right group size] each. shape: (out, in)."""
    return QuantizedLowRankCodec.name, shape, {"groups": groups}


@register
class QuantizedLowRankCodec(Factored):
    name = "quantized_low_rank"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        return grids.layout_of(_grids(shape, meta))

    def check(self, encoded: Encoded) -> None:
        grids.check(encoded, _grids(encoded.shape, encoded.meta))

    def decode(self, encoded: Encoded) -> Tensor:
        matrices = grids.unpack(encoded, _grids(encoded.shape, encoded.meta))
        delta = torch.zeros(encoded.shape)
        for left, right in zip(matrices[::2], matrices[1::2], strict=True):
            delta += left.T @ right
        return delta

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return sum(rank * bits for rank, bits, *_ in meta["groups"]) * sum(shape)

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        return grids.least_bits(_grids(shape, meta))

    def rank(self, meta: Meta) -> int:
        return sum(rank for rank, *_ in meta["groups"])

    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        self.check(encoded)
        codes, scales, first = encoded.parts["codes"], encoded.parts["scales"], 0
        for rank, bits, *sizes in encoded.meta["groups"]:
            for out, size in zip((left.T, right), sizes, strict=True):
                grid = Grid(rank, out.shape[1], bits, size)
                fill(out[first : first + rank], codes[: grid.bytes], scales[: grid.scales], grid)
                codes, scales = codes[grid.bytes :], scales[grid.scales :]
            first += rank


def _grids(shape: tuple[int, ...], meta: Meta) -> list[Grid]:
    """Grids of each rank group in turn, left (rank, out) and right (rank, in). Raises ValueError on nonsense."""
    fields(meta, "groups")
    rows, cols = matrix(shape)
    if not isinstance(meta["groups"], list):
        raise ValueError("groups is not a list.")
    whole(len(meta["groups"]), "the number of rank groups", 0, MAX_GROUPS)
    each = []
    for group in meta["groups"]:
        rank, bits, left_size, right_size = wholes(group, 4, "a rank group")
        each += [
            grids.checked_grid(rank, rows, bits, left_size),
            grids.checked_grid(rank, cols, bits, right_size),
        ]
    return each


def fill(out: Tensor, packed: Tensor, scales: Tensor, grid: Grid) -> None:
    """Write one matrix, a strip of rows at a time, with the operations of `Quantized.dequantize`."""
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
        # what does not lie straight is narrowed first: that halves what is strewn
        straight = target.is_contiguous()
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
