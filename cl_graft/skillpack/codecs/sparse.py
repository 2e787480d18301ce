"""`sparse`: some elements as floats, and their positions; all others are zero.

meta: dtype, kept, gap = [width, tokens] (absent where a bitmap is shorter); parts: values (kept,) and
index, bit-packed uint8 (packing.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import positions
from cl_graft.skillpack.codecs.codec import Scattered, register
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    dtype_name,
    dtype_of,
    fields,
    rounded,
)


def sparse(x: Tensor, mask: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """The elements where `mask` (bool, the shape of x) is true; the index form is the shorter one.

    x: any shape. Raises ValueError on a mask of another shape or dtype, on NaN, Inf or overflow.
    """
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(f"a mask for shape {tuple(x.shape)} is bool and of that shape.")
    values = rounded(x.detach().cpu()[mask.detach().cpu()], dtype, "the tensor")
    where, index = positions.store(mask)
    meta: Meta = {"dtype": dtype_name(dtype), **where}
    return Encoded(SparseCodec.name, tuple(x.shape), meta, {"values": values, "index": index})


def sparse_top(x: Tensor, keep: int, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """The `keep` elements of largest magnitude; of equal ones, the first in row-major order.

    Raises ValueError as `sparse` does, and for a `keep` beyond the number of elements.
    """
    if not 0 <= keep <= x.numel():
        raise ValueError(f"cannot keep {keep} of {x.numel()} elements.")
    # what compares with NaN would be left out in silence
    if not torch.isfinite(x).all():
        raise ValueError("the tensor holds NaN or Inf: there is nothing to store.")
    magnitude = x.detach().cpu().reshape(-1).abs()
    least = magnitude.kthvalue(x.numel() - keep + 1).values if keep else math.inf
    mask = magnitude > least
    ties = (magnitude == least).nonzero().reshape(-1)
    mask[ties[: keep - int(mask.sum())]] = True
    return sparse(x, mask.reshape(x.shape), dtype)


@register
class SparseCodec(Scattered):
    name = "sparse"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "dtype", *positions.names(meta))
        kept, index = positions.layout(meta, math.prod(shape))
        return {"values": (dtype_of(meta), (kept,)), "index": index}

    def check(self, encoded: Encoded) -> None:
        self.entries(encoded)

    def entries(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        return positions.load(encoded), encoded.parts["values"]

    def decode(self, encoded: Encoded) -> Tensor:
        places, values = self.entries(encoded)
        x = torch.zeros(math.prod(encoded.shape))
        x[places] = values.float()
        return x.reshape(encoded.shape)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 16 * meta["kept"]

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        kept = meta["kept"]
        return kept * 8 * dtype_of(meta).itemsize + positions.least_bits(kept, math.prod(shape))
