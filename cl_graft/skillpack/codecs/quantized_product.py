"""`quantized_product`: a product of group-quantised factors, of which the left one is grouped along the ranks.

As `quantized_low_rank`, but for the left factors: these lie as (out, rank), so that a scale belongs to an output and a
group of ranks. That is how GPTQ as released quantises U of a delta (Delta-CoMe, arXiv 2406.08903).
meta: groups = [[rank, bits, left group size, right group size], ...]; parts: codes, scales (grids.py), left and right
of each rank group in turn.
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
from cl_graft.skillpack.codecs.quantized_low_rank import MAX_GROUPS, fill


def quantized_product(
    pairs: Sequence[tuple[Quantized, Quantized]], shape: tuple[int, int]
) -> Encoded:
    """delta = sum_k left_k @ right_k, the rank group of the highest precision first.

    pairs: left_k (out, r_k), grouped along r_k, and right_k (r_k, in), grouped along in, both of the same bits; at most
    64 pairs. shape: (out, in). Raises ValueError where shapes, bits or codes do not fit together.
    """
    groups = []
    for pair in pairs:
        left, right = (packing.grid_of(factor) for factor in pair)
        if (left.rows, left.cols, right.cols) != (shape[0], right.rows, shape[1]):
            shapes = f"({left.rows}, {left.cols}) and ({right.rows}, {right.cols})"
            raise ValueError(f"factors {shapes} are not (out, r) and (r, in) of shape {shape}.")
        if left.bits != right.bits:
            raise ValueError(f"a rank group has {left.bits} bits left, but {right.bits} right.")
        groups.append([right.rows, right.bits, left.group_size, right.group_size])
    whole(len(groups), "the number of rank groups", 0, MAX_GROUPS)
    parts = grids.pack([factor for pair in pairs for factor in pair])
    return Encoded(*quantized_product_spec(tuple(shape), groups), parts)


def quantized_product_spec(shape: tuple[int, ...], groups: list[list[int]]) -> Spec:
    """What `quantized_product` says of such rank groups, before there are any. shape: (out, in)."""
    return QuantizedProductCodec.name, shape, {"groups": groups}


@register
class QuantizedProductCodec(Factored):
    name = "quantized_product"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        return grids.layout_of(_grids(shape, meta))

    def check(self, encoded: Encoded) -> None:
        grids.check(encoded, _grids(encoded.shape, encoded.meta))

    def decode(self, encoded: Encoded) -> Tensor:
        matrices = grids.unpack(encoded, _grids(encoded.shape, encoded.meta))
        delta = torch.zeros(encoded.shape)
        for left, right in zip(matrices[::2], matrices[1::2], strict=True):
            delta += left @ right
        return delta

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return sum(rank * bits for rank, bits, *_ in meta["groups"]) * sum(shape)

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        return grids.least_bits(_grids(shape, meta))

    def rank(self, meta: Meta) -> int:
        return sum(rank for rank, *_ in meta["groups"])

    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        codes, scales, first = encoded.parts["codes"], encoded.parts["scales"], 0
        matrices = _grids(encoded.shape, encoded.meta)
        for left_grid, right_grid in zip(matrices[::2], matrices[1::2], strict=True):
            ranks = slice(first, first + right_grid.rows)
            for out, grid in ((left[:, ranks], left_grid), (right[ranks], right_grid)):
                fill(out, codes[: grid.bytes], scales[: grid.scales], grid)
                codes, scales = codes[grid.bytes :], scales[grid.scales :]
            first = ranks.stop


def _grids(shape: tuple[int, ...], meta: Meta) -> list[Grid]:
    """Grids of each rank group in turn, left (out, rank) and right (rank, in). Raises ValueError on nonsense."""
    fields(meta, "groups")
    rows, cols = matrix(shape)
    if not isinstance(meta["groups"], list):
        raise ValueError("groups is not a list.")
    whole(len(meta["groups"]), "the number of rank groups", 0, MAX_GROUPS)
    each = []
    for group in meta["groups"]:
        rank, bits, left_size, right_size = wholes(group, 4, "a rank group")
        each += [
            grids.checked_grid(rows, rank, bits, left_size),
            grids.checked_grid(rank, cols, bits, right_size),
        ]
    return each
