"""The codecs of group-quantised matrices: one matrix, and a product of factors by rank groups.

Their layouts follow from the grids (packing.Grid) that shape and meta describe; codes and zeros of
all grids lie one after the other in the part `codes`, their scales in the part `scales`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    fields,
    matrix,
    rounded,
    whole,
    wholes,
)
from cl_graft.skillpack.codecs.packing import Grid
from cl_graft.skillpack.codecs.quant import BITS, Quantized

MAX_GROUPS = 64  # rank groups of one tensor: decoding adds a whole matrix for each
Grids = Callable[[tuple[int, ...], Meta], list[Grid]]


def quantized(q: Quantized) -> Encoded:
    """One group-quantised matrix (out, in), codes and zeros packed at `q.bits` bits."""
    meta = {"bits": q.bits, "group_size": q.group_size}
    return Encoded("quantized", matrix(tuple(q.codes.shape)), meta, _pack_grids([q]))


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
            found = f"({left.rows}, {left.cols}) and ({right.rows}, {right.cols})"
            raise ValueError(f"factors {found} are not (r, out) and (r, in) of shape {shape}.")
        if left.bits != right.bits:
            raise ValueError(f"a rank group has {left.bits} bits left, but {right.bits} right.")
        groups.append([left.rows, left.bits, left.group_size, right.group_size])
    whole(len(groups), "the number of rank groups", 0, MAX_GROUPS)
    parts = _pack_grids([factor for pair in pairs for factor in pair])
    return Encoded("quantized_low_rank", tuple(shape), {"groups": groups}, parts)


def matrix_grids(shape: tuple[int, ...], meta: Meta) -> list[Grid]:
    """The one grid of `quantized`. Raises ValueError on nonsense."""
    fields(meta, "bits", "group_size")
    return [_grid(*matrix(shape), meta["bits"], meta["group_size"])]


def factor_grids(shape: tuple[int, ...], meta: Meta) -> list[Grid]:
    """Left and right of each rank group of `quantized_low_rank`, in turn; ValueError on nonsense."""
    fields(meta, "groups")
    rows, cols = matrix(shape)
    if not isinstance(meta["groups"], list):
        raise ValueError("groups is not a list.")
    whole(len(meta["groups"]), "the number of rank groups", 0, MAX_GROUPS)
    grids = []
    for group in meta["groups"]:
        rank, bits, left_size, right_size = wholes(group, 4, "a rank group")
        grids += [_grid(rank, rows, bits, left_size), _grid(rank, cols, bits, right_size)]
    return grids


def layout_of(grids: Grids, shape: tuple[int, ...], meta: Meta) -> Layout:
    """The parts that hold these grids."""
    found = grids(shape, meta)
    codes, scales = sum(grid.bytes for grid in found), sum(grid.scales for grid in found)
    return {"codes": (torch.uint8, (codes,)), "scales": (torch.float16, (scales,))}


def check_grids(grids: Grids, encoded: Encoded) -> None:
    """Raise ValueError where a grid's exponent is out of range or bits are set after its end."""
    found = grids(encoded.shape, encoded.meta)
    codes = encoded.parts["codes"].split([grid.bytes for grid in found])
    for packed, grid in zip(codes, found, strict=True):
        packing.check_quantized(packed, grid)


def decode_matrix(encoded: Encoded) -> Tensor:
    """float32 (out, in) of `quantized`."""
    return _dequantized(encoded, matrix_grids(encoded.shape, encoded.meta))[0]


def decode_factors(encoded: Encoded) -> Tensor:
    """float32 (out, in) of `quantized_low_rank`."""
    matrices = _dequantized(encoded, factor_grids(encoded.shape, encoded.meta))
    delta = torch.zeros(encoded.shape)
    for left, right in zip(matrices[::2], matrices[1::2], strict=True):
        delta += left.T @ right
    return delta


def _grid(rows: int, cols: int, bits: object, group_size: object) -> Grid:
    bits = whole(bits, "bits", 0)
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, not one of {BITS}.")
    return Grid(rows, cols, bits, whole(group_size, "a group size", 1))


def _pack_grids(matrices: list[Quantized]) -> dict[str, Tensor]:
    codes = [packing.pack_quantized(q) for q in matrices]
    scales = [rounded(q.scale, torch.float16, "a scale").reshape(-1) for q in matrices]
    return {
        "codes": torch.cat([torch.empty(0, dtype=torch.uint8), *codes]),
        "scales": torch.cat([torch.empty(0, dtype=torch.float16), *scales]),
    }


def _dequantized(encoded: Encoded, grids: list[Grid]) -> list[Tensor]:
    codes = encoded.parts["codes"].split([grid.bytes for grid in grids])
    scales = encoded.parts["scales"].split([grid.scales for grid in grids])
    parts = zip(codes, scales, grids, strict=True)
    return [packing.unpack_quantized(*part).dequantize() for part in parts]
