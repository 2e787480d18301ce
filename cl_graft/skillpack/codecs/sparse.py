"""`sparse`: some elements as floats, and their positions; all others are zero.

meta: dtype, kept, gap = [width, tokens] (absent where a bitmap is shorter); parts: values (kept,) and
index, bit-packed uint8 (packing.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.codec import Scattered, register
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    dtype_name,
    dtype_of,
    fields,
    rounded,
    whole,
)


def sparse(x: Tensor, mask: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """The elements where `mask` (bool, the shape of x) is true; the index form is the shorter one.

    x: any shape. Raises ValueError on a mask of another shape or dtype, on NaN, Inf or overflow.
    """
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(f"a mask for shape {tuple(x.shape)} is bool and of that shape.")
    flat = mask.detach().cpu().reshape(-1)
    positions = flat.nonzero().reshape(-1)
    values = rounded(x.detach().cpu().reshape(-1)[positions], dtype, "the tensor")
    gap, index = packing.pack_index(positions, flat.numel())
    meta: Meta = {"dtype": dtype_name(dtype), "kept": positions.numel()}
    meta |= {"gap": gap} if gap else {}
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
        fields(meta, "dtype", "kept", *(["gap"] if "gap" in meta else []))
        numel = math.prod(shape)
        kept = whole(meta["kept"], "kept", 0, numel)
        index = packing.packed_bytes(numel, 1)
        if "gap" in meta:
            index = packing.gap_bytes(meta["gap"], numel)
        return {"values": (dtype_of(meta), (kept,)), "index": (torch.uint8, (index,))}

    def check(self, encoded: Encoded) -> None:
        self.entries(encoded)

    def entries(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        numel = math.prod(encoded.shape)
        positions = packing.unpack_index(encoded.parts["index"], encoded.meta.get("gap"), numel)
        if positions.numel() != encoded.meta["kept"]:
            raise ValueError(f"{positions.numel()} positions for {encoded.meta['kept']} values.")
        return positions, encoded.parts["values"]

    def decode(self, encoded: Encoded) -> Tensor:
        positions, values = self.entries(encoded)
        x = torch.zeros(math.prod(encoded.shape))
        x[positions] = values.float()
        return x.reshape(encoded.shape)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 16 * meta["kept"]

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        """The values, and the logarithm of the number of ways to choose their positions: no index
        can be shorter on average."""
        numel, kept = math.prod(shape), meta["kept"]
        ways = math.lgamma(numel + 1) - math.lgamma(kept + 1) - math.lgamma(numel - kept + 1)
        return kept * 8 * dtype_of(meta).itemsize + ways / math.log(2)
