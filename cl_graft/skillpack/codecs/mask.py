"""`mask`: one bit an element, which says where something else counts.

meta: nothing; parts: bits, bit-packed uint8 (packing.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.codec import Codec, register
from cl_graft.skillpack.codecs.encoded import Encoded, Layout, Meta, fields


def mask(x: Tensor) -> Encoded:
    """x, bool, of any shape. Raises ValueError on another dtype."""
    if x.dtype != torch.bool:
        raise ValueError(f"a mask is bool, not {x.dtype}.")
    bits = packing.pack(x.detach().cpu().to(torch.uint8), 1)
    return Encoded(MaskCodec.name, tuple(x.shape), {}, {"bits": bits})


@register
class MaskCodec(Codec):
    name = "mask"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta)
        return {"bits": (torch.uint8, (packing.packed_bytes(math.prod(shape), 1),))}

    def check(self, encoded: Encoded) -> None:
        packing.check_packed(encoded.parts["bits"], math.prod(encoded.shape), 1)

    def decode(self, encoded: Encoded) -> Tensor:
        """1 where the bit is set, else 0."""
        bits = packing.unpack(encoded.parts["bits"], math.prod(encoded.shape), 1)
        return bits.float().reshape(encoded.shape)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        """No bits: a mask keeps no weight."""
        return 0

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        return math.prod(shape)
