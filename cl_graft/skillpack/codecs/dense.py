"""`dense`: every element as a float. meta: dtype; parts: values, in the shape of the tensor."""

from __future__ import annotations

import math

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
)


def dense(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """Every element of x (any shape) in `dtype`. Raises ValueError on NaN, Inf or overflow."""
    values = rounded(x, dtype, "the tensor")
    return Encoded(*dense_spec(tuple(x.shape), dtype), {"values": values})


def dense_spec(shape: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> Spec:
    """What `dense` says of a tensor of this shape, before there is one."""
    return DenseCodec.name, shape, {"dtype": dtype_name(dtype)}


@register
class DenseCodec(Codec):
    name = "dense"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "dtype")
        return {"values": (dtype_of(meta), shape)}

    def decode(self, encoded: Encoded) -> Tensor:
        return encoded.parts["values"].to(torch.float32, copy=True)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 16 * math.prod(shape)

    def rows(self, encoded: Encoded, ids: Tensor) -> Tensor:
        return encoded.parts["values"][ids].float()
