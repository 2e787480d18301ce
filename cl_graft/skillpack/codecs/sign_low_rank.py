"""`sign_low_rank`: a product of factors, the first ranks on a grid and the others by signs (arXiv 2510.26690).

meta: grid = [rank, bits, left group size, right group size] and signs = [rank, left group size, right group size];
parts: codes and scales of left (rank, out) and right (rank, in) on the grid (grids.py), and of the other ranks, left
(rank, out) and then right (rank, in): signs, bit-packed uint8, and sizes, bfloat16, one a group of columns of a rank.
"""

from __future__ import annotations

import math

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
    rounded,
    whole,
    wholes,
)
from cl_graft.skillpack.codecs.packing import Grid
from cl_graft.skillpack.codecs.quant import Quantized, groups_in


def sign_low_rank(
    high: tuple[Quantized, Quantized], low: tuple[Tensor, Tensor], group_size: int
) -> Encoded:
    """delta = left.T @ right of `high` + the same of `low`, each group of which keeps its signs and mean magnitude.

    high: left (h, out) and right (h, in) of the same bits, groups along out and in; h may be 0. low: float (l, out)
    and (l, in), in groups of `group_size` along the columns; zeros count as negative. Raises ValueError where shapes
    or bits do not fit together, and on NaN or Inf.
    """
    left, right = (packing.grid_of(factor) for factor in high)
    shape = (left.cols, right.cols)
    if (left.rows, left.bits) != (right.rows, right.bits):
        raise ValueError(f"factors on the grids {left} and {right} have no product.")
    if [tuple(x.shape) for x in low] != [(len(low[0]), size) for size in shape]:
        raise ValueError(f"factors {[tuple(x.shape) for x in low]} do not fit the shape {shape}.")
    factors = [rounded(x, torch.float32, "a factor") for x in low]
    grid = [left.rows, left.bits, left.group_size, right.group_size]
    spec = sign_low_rank_spec(shape, grid, [len(low[0]), group_size, group_size])
    bits = torch.cat([(x > 0).to(torch.uint8).flatten() for x in factors])
    sizes = torch.cat([_magnitudes(x, group_size).flatten() for x in factors])
    parts = {
        **grids.pack(high),
        "signs": packing.pack(bits, 1),
        "sizes": rounded(sizes, torch.bfloat16, "a magnitude"),
    }
    return Encoded(*spec, parts)


def sign_low_rank_spec(shape: tuple[int, ...], grid: list[int], signs: list[int]) -> Spec:
    """What `sign_low_rank` says of such ranks, before there are any. grid, signs: see the meta."""
    return SignLowRankCodec.name, shape, {"grid": grid, "signs": signs}


def _magnitudes(x: Tensor, size: int) -> Tensor:
    """The mean magnitude of each group of `size` columns, (rows, groups); the last may be shorter."""
    parts = [part.abs().mean(1) for part in x.split(size, 1)] if x.shape[1] else []
    return torch.stack(parts, 1) if parts else x[:, :0]


@register
class SignLowRankCodec(Factored):
    name = "sign_low_rank"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        rows, cols = matrix(shape)
        rank, left, right = _signs(meta)
        signs = packing.packed_bytes(rank * (rows + cols), 1)
        sizes = rank * (groups_in(rows, left) + groups_in(cols, right))
        return {
            **grids.layout_of(_grids(shape, meta)),
            "signs": (torch.uint8, (signs,)),
            "sizes": (torch.bfloat16, (sizes,)),
        }

    def check(self, encoded: Encoded) -> None:
        grids.check(encoded, _grids(encoded.shape, encoded.meta))
        signs = encoded.meta["signs"][0] * sum(encoded.shape)
        packing.check_packed(encoded.parts["signs"], signs, 1)

    def decode(self, encoded: Encoded) -> Tensor:
        high = grids.unpack(encoded, _grids(encoded.shape, encoded.meta))
        low = _low(encoded)
        return high[0].T @ high[1] + low[0].T @ low[1]

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        rank, bits, *_ = meta["grid"]
        return (rank * bits + meta["signs"][0]) * sum(shape)

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        rank, left, right = meta["signs"]
        sizes = rank * (groups_in(shape[0], left) + groups_in(shape[1], right))
        return grids.least_bits(_grids(shape, meta)) + rank * sum(shape) + 16 * sizes

    def rank(self, meta: Meta) -> int:
        return meta["grid"][0] + meta["signs"][0]

    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        high = grids.unpack(encoded, _grids(encoded.shape, encoded.meta))
        for out, top, rest in zip((left.T, right), high, _low(encoded), strict=True):
            out[: len(top)] = top
            out[len(top) :] = rest


def _signs(meta: Meta) -> list[int]:
    """[rank, left group size, right group size]. Raises ValueError on nonsense."""
    fields(meta, "grid", "signs")
    rank, *sizes = wholes(meta["signs"], 3, "signs")
    return [rank, *(whole(size, "a group size", 1) for size in sizes)]


def _grids(shape: tuple[int, ...], meta: Meta) -> list[Grid]:
    """Grids of left (rank, out) and right (rank, in). Raises ValueError on nonsense."""
    rows, cols = matrix(shape)
    rank, bits, left, right = wholes(meta["grid"], 4, "grid")
    return [
        grids.checked_grid(rank, rows, bits, left),
        grids.checked_grid(rank, cols, bits, right),
    ]


def _low(encoded: Encoded) -> list[Tensor]:
    """The factors kept by signs, float32 (rank, out) and (rank, in)."""
    rank, *group_sizes = encoded.meta["signs"]
    signs = packing.unpack(encoded.parts["signs"], rank * sum(encoded.shape), 1).bool()
    sizes, found = encoded.parts["sizes"].float(), []
    for cols, group in zip(encoded.shape, group_sizes, strict=True):
        shape = (rank, groups_in(cols, group))
        scale = sizes[: math.prod(shape)].reshape(shape)[:, torch.arange(cols) // group]
        found.append(torch.where(signs[: rank * cols].reshape(rank, cols), scale, -scale))
        signs, sizes = signs[rank * cols :], sizes[math.prod(shape) :]
    return found
