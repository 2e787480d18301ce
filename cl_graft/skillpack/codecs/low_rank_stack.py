"""`low_rank_stack`: a stack of matrices, each the product of two, as of the experts of a layer.

meta: dtype, rank; parts: left (stack, rows, rank), right (stack, rank, cols).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_graft.skillpack.codecs.codec import Codec, register
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    Spec,
    dtype_name,
    dtype_of,
    fields,
    rounded,
    short,
    whole,
)


def low_rank_stack(left: Tensor, right: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """delta[i] = left[i] @ right[i]. left: (stack, rows, r), right: (stack, r, cols). Raises ValueError as `dense`."""
    fit = left.ndim == right.ndim == 3 and left.shape[::2] == right.shape[:2]
    if not fit:
        raise ValueError(f"factors {tuple(left.shape)} and {tuple(right.shape)} have no product.")
    parts = {
        "left": rounded(left, dtype, "the left factor"),
        "right": rounded(right, dtype, "the right factor"),
    }
    shape = (*left.shape[:2], right.shape[2])
    return Encoded(*low_rank_stack_spec(shape, left.shape[2], dtype), parts)


def low_rank_stack_spec(
    shape: tuple[int, ...], rank: int, dtype: torch.dtype = torch.bfloat16
) -> Spec:
    """What `low_rank_stack` says of factors of this rank, before there are any. shape: (stack, rows, cols)."""
    return LowRankStackCodec.name, shape, {"dtype": dtype_name(dtype), "rank": rank}


@register
class LowRankStackCodec(Codec):
    name = "low_rank_stack"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "dtype", "rank")
        if len(shape) != 3:
            raise ValueError(f"shape {short(shape)} is not that of a stack of matrices.")
        dtype, rank = dtype_of(meta), whole(meta["rank"], "rank", 0)
        stack, rows, cols = shape
        return {"left": (dtype, (stack, rows, rank)), "right": (dtype, (stack, rank, cols))}

    def decode(self, encoded: Encoded) -> Tensor:
        return encoded.parts["left"].float() @ encoded.parts["right"].float()

    def rows(self, encoded: Encoded, ids: Tensor) -> Tensor:
        return encoded.parts["left"][ids].float() @ encoded.parts["right"][ids].float()

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 16 * meta["rank"] * shape[0] * sum(shape[1:])
