"""`exact`: a tensor bit for bit in its own dtype, for state that is no delta: counts, sums, bytes of text.

meta: dtype; parts: values, in the shape of the tensor. Nothing is compressed: a pack has one file, and
deflate has many streams for the same bytes, none of a size that is known before the data are. Bytes
that a method compresses itself are a uint8 tensor as good as any.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs.codec import Codec, check, register
from cl_graft.skillpack.codecs.encoded import (
    STORABLE,
    Encoded,
    Layout,
    Meta,
    Spec,
    dtype_name,
    dtype_of,
    fields,
)


def exact(x: Tensor) -> Encoded:
    """x, of any shape and one of the dtypes of a file: uint8, int32, int64 or a float of 16 to 64 bits.

    Raises ValueError on another dtype, and on NaN or Inf.
    """
    spec = exact_spec(tuple(x.shape), x.dtype)
    values = x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    if not torch.isfinite(values).all():
        raise ValueError("the tensor holds NaN or Inf: there is nothing to store.")
    return Encoded(*spec, {"values": values})


def exact_spec(shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
    """What `exact` says of a tensor of this shape and dtype, before there is one."""
    return ExactCodec.name, shape, {"dtype": dtype_name(dtype, STORABLE)}


def unknown(shape: tuple[int, ...], dtype: torch.dtype) -> Encoded:
    """What `exact` will make of a tensor of which only this is known yet; its values are on the meta device."""
    values = torch.empty(shape, dtype=dtype, device="meta")
    return Encoded(*exact_spec(tuple(shape), dtype), {"values": values})


def original(encoded: Encoded) -> Tensor:
    """The tensor that `exact` was given, in its own dtype, on the CPU (that of `unknown` on the meta device).

    Raises ValueError where another codec has stored the tensor, or as `check` does.
    """
    if encoded.codec != ExactCodec.name:
        raise ValueError(f"codec {encoded.codec} keeps no original; decode the tensor instead.")
    check(encoded)
    return encoded.parts["values"].clone()


@register
class ExactCodec(Codec):
    name = "exact"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "dtype")
        return {"values": (dtype_of(meta, STORABLE), shape)}

    def decode(self, encoded: Encoded) -> Tensor:
        """The nearest float32: whole numbers beyond 2**24 are rounded, floats beyond its range infinite."""
        return encoded.parts["values"].to(torch.float32, copy=True)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        """All bits: state is counted in full."""
        return 8 * dtype_of(meta, STORABLE).itemsize * math.prod(shape)

    def rows(self, encoded: Encoded, ids: Tensor) -> Tensor:
        return encoded.parts["values"][ids].float()
