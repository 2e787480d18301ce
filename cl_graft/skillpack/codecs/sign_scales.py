"""`sign_scales`: one sign an element and one scale a row, or a column, of a matrix (arXiv 2512.19720).

meta: axis, 0 for a scale a row, 1 for a scale a column; parts: signs, bit-packed uint8 (packing.py), and scales,
bfloat16 (rows or columns,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.codec import Codec, register
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    Spec,
    fields,
    matrix,
    rounded,
    whole,
)


def sign_scales(x: Tensor, axis: int, scales: Tensor | None = None) -> Encoded:
    """scales * sign(x), with zeros counted as negative.

    x: (rows, cols). axis: 0 for a scale a row, 1 for one a column. scales: (rows,) or (cols,); by default the mean
    magnitudes, which minimise the squared error. Raises ValueError on NaN, Inf, or scales of another number.
    """
    x = rounded(x, torch.float32, "the tensor")
    spec = sign_scales_spec(tuple(x.shape), axis)
    if scales is None:
        scales = x.abs().mean(1 - axis) if x.numel() else torch.zeros(x.shape[axis])
    if tuple(scales.shape) != (x.shape[axis],):
        raise ValueError(f"{tuple(scales.shape)} scales for {x.shape[axis]} rows or columns.")
    parts = {
        "signs": packing.pack((x > 0).to(torch.uint8), 1),
        "scales": rounded(scales, torch.bfloat16, "a scale"),
    }
    return Encoded(*spec, parts)


def sign_scales_spec(shape: tuple[int, ...], axis: int) -> Spec:
    """What `sign_scales` says of a matrix of this shape. Raises ValueError for what is none."""
    matrix(shape)
    return SignScalesCodec.name, shape, {"axis": whole(axis, "axis", 0, 1)}


@register
class SignScalesCodec(Codec):
    name = "sign_scales"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "axis")
        size = packing.packed_bytes(math.prod(matrix(shape)), 1)
        scales = shape[whole(meta["axis"], "axis", 0, 1)]
        return {"signs": (torch.uint8, (size,)), "scales": (torch.bfloat16, (scales,))}

    def check(self, encoded: Encoded) -> None:
        packing.check_packed(encoded.parts["signs"], math.prod(encoded.shape), 1)

    def decode(self, encoded: Encoded) -> Tensor:
        signs = packing.unpack(encoded.parts["signs"], math.prod(encoded.shape), 1).bool()
        scales = encoded.parts["scales"].float().unsqueeze(1 - encoded.meta["axis"])
        return torch.where(signs.reshape(encoded.shape), scales, -scales)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return math.prod(shape)

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        return math.prod(shape) + 16 * shape[meta["axis"]]
