"""`sign_scale`: one sign an element and one scale for all (BitDelta, Liu et al. 2024, arXiv 2402.10193).

meta: nothing; parts: signs, bit-packed uint8 (packing.py), and scale, float32 (1,).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.codec import Codec, register
from cl_graft.skillpack.codecs.encoded import Encoded, Layout, Meta, Spec, fields, rounded


def sign_scale(x: Tensor, scale: float | None = None) -> Encoded:
    """scale * sign(x), with zeros counted as negative.

    x: any shape. scale: by default the mean magnitude, which minimises the squared error.
    Raises ValueError on NaN, Inf, or a scale beyond float32.
    """
    x = rounded(x, torch.float32, "the tensor")
    if scale is None:
        scale = float(x.abs().double().mean()) if x.numel() else 0.0
    one = rounded(torch.tensor([scale], dtype=torch.float64), torch.float32, "the scale")
    parts = {"signs": packing.pack((x > 0).to(torch.uint8), 1), "scale": one}
    return Encoded(*sign_scale_spec(tuple(x.shape)), parts)


def sign_scale_spec(shape: tuple[int, ...]) -> Spec:
    """What `sign_scale` says of a tensor of this shape, before there is one."""
    return SignScaleCodec.name, shape, {}


@register
class SignScaleCodec(Codec):
    name = "sign_scale"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta)
        size = packing.packed_bytes(math.prod(shape), 1)
        return {"signs": (torch.uint8, (size,)), "scale": (torch.float32, (1,))}

    def check(self, encoded: Encoded) -> None:
        packing.check_packed(encoded.parts["signs"], math.prod(encoded.shape), 1)

    def decode(self, encoded: Encoded) -> Tensor:
        signs = packing.unpack(encoded.parts["signs"], math.prod(encoded.shape), 1).bool()
        scale = encoded.parts["scale"]
        return torch.where(signs, scale, -scale).reshape(encoded.shape)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return math.prod(shape)

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        return math.prod(shape)
