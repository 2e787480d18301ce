"""`sparse_codebook`: some elements as indices into a few levels, and their positions; all others are zero.

Ternary deltas (ComPEFT, arXiv 2311.13171) have two levels, pruned quantised ones (UltraDelta, arXiv 2505.13563) more.
meta: bits, kept, gap (positions.py); parts: levels, float32 (2**bits,), codes and index, bit-packed uint8 (packing.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing, positions
from cl_graft.skillpack.codecs.codec import Scattered, register
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    Spec,
    fields,
    rounded,
    whole,
)


def sparse_codebook(codes: Tensor, mask: Tensor, levels: Tensor) -> Encoded:
    """levels[codes] where the mask is true.

    codes: uint8, any shape. mask: bool, the shape of codes. levels: (2**bits,), bits 1 to 8. Raises ValueError on a
    mask of another shape or dtype, levels of another number, NaN or Inf, and a code beyond the levels.
    """
    if mask.shape != codes.shape or mask.dtype != torch.bool:
        raise ValueError(f"a mask for shape {tuple(codes.shape)} is bool and of that shape.")
    bits = len(levels).bit_length() - 1
    if levels.ndim != 1 or len(levels) != 1 << bits or not 1 <= bits <= 8:
        raise ValueError(f"{tuple(levels.shape)} levels are not 2, 4, 8, up to 256.")
    where, index = positions.store(mask)
    kept = codes.detach().cpu()[mask.detach().cpu()]
    parts = {
        "levels": rounded(levels, torch.float32, "a level"),
        "codes": packing.pack(kept, bits),
        "index": index,
    }
    return Encoded(SparseCodebookCodec.name, tuple(codes.shape), {"bits": bits, **where}, parts)


def sparse_codebook_spec(mask: Tensor, bits: int) -> Spec:
    """What `sparse_codebook` says of such a mask, before there are codes."""
    return SparseCodebookCodec.name, tuple(mask.shape), {"bits": bits, **positions.spec(mask)}


@register
class SparseCodebookCodec(Scattered):
    name = "sparse_codebook"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "bits", *positions.names(meta))
        bits = whole(meta["bits"], "bits", 1, 8)
        kept, index = positions.layout(meta, math.prod(shape))
        codes = packing.packed_bytes(kept, bits)
        return {
            "levels": (torch.float32, (1 << bits,)),
            "codes": (torch.uint8, (codes,)),
            "index": index,
        }

    def check(self, encoded: Encoded) -> None:
        self.entries(encoded)

    def entries(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        meta, parts = encoded.meta, encoded.parts
        codes = packing.unpack(parts["codes"], meta["kept"], meta["bits"])
        return positions.load(encoded), parts["levels"][codes.long()]

    def decode(self, encoded: Encoded) -> Tensor:
        places, values = self.entries(encoded)
        x = torch.zeros(math.prod(encoded.shape))
        x[places] = values
        return x.reshape(encoded.shape)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return meta["bits"] * meta["kept"]

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        kept, bits = meta["kept"], meta["bits"]
        return 32 * 2**bits + bits * kept + positions.least_bits(kept, math.prod(shape))
