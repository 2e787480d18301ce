"""`low_rank`: a matrix as the product of two. meta: dtype, rank; parts: left (out, rank), right (rank, in)."""

from __future__ import annotations

import torch
from torch import Tensor

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


def low_rank(left: Tensor, right: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """delta = left @ right. left: (out, r), right: (r, in). Raises ValueError as `dense` does."""
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors {tuple(left.shape)} and {tuple(right.shape)} have no product.")
    parts = {
        "left": rounded(left, dtype, "the left factor"),
        "right": rounded(right, dtype, "the right factor"),
    }
    shape = (left.shape[0], right.shape[1])
    return Encoded(*low_rank_spec(shape, left.shape[1], dtype), parts)


def low_rank_spec(shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.bfloat16) -> Spec:
    """What `low_rank` says of factors of this rank, before there are any. shape: (out, in)."""
    return LowRankCodec.name, shape, {"dtype": dtype_name(dtype), "rank": rank}


@register
class LowRankCodec(Factored):
    name = "low_rank"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "dtype", "rank")
        rows, cols = matrix(shape)
        dtype, rank = dtype_of(meta), whole(meta["rank"], "rank", 0)
        return {"left": (dtype, (rows, rank)), "right": (dtype, (rank, cols))}

    def decode(self, encoded: Encoded) -> Tensor:
        return encoded.parts["left"].float() @ encoded.parts["right"].float()

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 16 * meta["rank"] * sum(shape)

    def rank(self, meta: Meta) -> int:
        return meta["rank"]

    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        left.copy_(encoded.parts["left"])
        right.copy_(encoded.parts["right"])
