"""`sparse_low_rank`: a product of factors of which some elements are kept (ImPart, arXiv 2504.13237).

meta: dtype, rank, and left and right, each [kept, gap width, gap tokens], or [kept] where a bitmap is shorter; parts of
left (rank, out) and right (rank, in): left and right, the values, and left_index and right_index, bit-packed uint8
(packing.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import positions
from cl_graft.skillpack.codecs.codec import Factored, register
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    Spec,
    dtype_name,
    dtype_of,
    fields,
    matrix,
    rounded,
    whole,
)


def sparse_low_rank(left: Tensor, right: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """delta = left.T @ right, of which the elements other than 0 are stored.

    left: (r, out), right: (r, in). Raises ValueError where they have no product, and as `sparse` does.
    """
    if left.ndim != 2 or right.ndim != 2 or len(left) != len(right):
        raise ValueError(f"factors {tuple(left.shape)} and {tuple(right.shape)} have no product.")
    parts = {}
    for side, factor in (("left", left), ("right", right)):
        mask = factor != 0
        parts[side] = rounded(factor[mask], dtype, f"the {side} factor")
        parts[f"{side}_index"] = positions.store(mask)[1]
    return Encoded(*sparse_low_rank_spec(left != 0, right != 0, dtype), parts)


def sparse_low_rank_spec(left: Tensor, right: Tensor, dtype: torch.dtype = torch.bfloat16) -> Spec:
    """What `sparse_low_rank` says of factors with these masks, bool (r, out) and (r, in)."""
    meta: Meta = {"dtype": dtype_name(dtype), "rank": len(left)}
    for side, mask in (("left", left), ("right", right)):
        said = positions.spec(mask)
        meta[side] = [said["kept"], *said.get("gap", [])]
    return SparseLowRankCodec.name, (left.shape[1], right.shape[1]), meta


class _Side(NamedTuple):
    """A factor: its name, its size (rank, cols), and what a sparse tensor would say of it."""

    name: str
    size: tuple[int, int]
    meta: Meta


@register
class SparseLowRankCodec(Factored):
    name = "sparse_low_rank"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "dtype", "rank", "left", "right")
        dtype = dtype_of(meta)
        parts: Layout = {}
        for side in _sides(shape, meta):
            kept, index = positions.layout(side.meta, math.prod(side.size))
            parts |= {side.name: (dtype, (kept,)), f"{side.name}_index": index}
        return parts

    def check(self, encoded: Encoded) -> None:
        for side in _sides(encoded.shape, encoded.meta):
            positions.load(_sparse(encoded, side))

    def decode(self, encoded: Encoded) -> Tensor:
        left, right = _factors(encoded)
        return left.T @ right

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 16 * (meta["left"][0] + meta["right"][0])

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        width = 8 * dtype_of(meta).itemsize
        kept = [(side.meta["kept"], math.prod(side.size)) for side in _sides(shape, meta)]
        return sum(count * width + positions.least_bits(count, size) for count, size in kept)

    def rank(self, meta: Meta) -> int:
        return meta["rank"]

    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        for out, factor in zip((left.T, right), _factors(encoded), strict=True):
            out.copy_(factor)


def _sides(shape: tuple[int, ...], meta: Meta) -> list[_Side]:
    """Both factors, left (rank, out) and right (rank, in). Raises ValueError on nonsense."""
    sizes, found = matrix(shape), []
    # a rank beyond both sizes is of no use, and costs nothing to claim
    rank = whole(meta["rank"], "rank", 0, max(sizes))
    for name, cols in zip(("left", "right"), sizes, strict=True):
        said = meta[name]
        if not isinstance(said, list) or len(said) not in (1, 3):
            raise ValueError(f"{name} is neither [kept] nor [kept, gap width, gap tokens].")
        gap = {"gap": said[1:]} if len(said) == 3 else {}
        found.append(_Side(name, (rank, cols), {"kept": said[0], **gap}))
    return found


def _sparse(encoded: Encoded, side: _Side) -> Encoded:
    """One factor's positions, as those of a sparse tensor."""
    index = encoded.parts[f"{side.name}_index"]
    return Encoded("sparse", side.size, side.meta, {"index": index})


def _factors(encoded: Encoded) -> list[Tensor]:
    """float32 (rank, out) and (rank, in)."""
    found = []
    for side in _sides(encoded.shape, encoded.meta):
        factor = torch.zeros(math.prod(side.size))
        factor[positions.load(_sparse(encoded, side))] = encoded.parts[side.name].float()
        found.append(factor.reshape(side.size))
    return found
