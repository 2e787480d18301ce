"""`quantized`: one group-quantised matrix. meta: bits, group_size; parts: codes, scales (grids.py)."""

from __future__ import annotations

import math

from torch import Tensor

from cl_graft.skillpack.codecs import grids
from cl_graft.skillpack.codecs.codec import Codec, register
from cl_graft.skillpack.codecs.encoded import Encoded, Layout, Meta, fields, matrix
from cl_graft.skillpack.codecs.packing import Grid
from cl_graft.skillpack.codecs.quant import Quantized


def quantized(q: Quantized) -> Encoded:
    """One group-quantised matrix (out, in), codes and zeros packed at `q.bits` bits."""
    meta = {"bits": q.bits, "group_size": q.group_size}
    return Encoded(QuantizedCodec.name, matrix(tuple(q.codes.shape)), meta, grids.pack([q]))


@register
class QuantizedCodec(Codec):
    name = "quantized"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        return grids.layout_of(_grids(shape, meta))

    def check(self, encoded: Encoded) -> None:
        grids.check(encoded, _grids(encoded.shape, encoded.meta))

    def decode(self, encoded: Encoded) -> Tensor:
        return grids.unpack(encoded, _grids(encoded.shape, encoded.meta))[0]

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return meta["bits"] * math.prod(shape)

    def least_bits(self, shape: tuple[int, ...], meta: Meta) -> float:
        return grids.least_bits(_grids(shape, meta))


def _grids(shape: tuple[int, ...], meta: Meta) -> list[Grid]:
    """The one grid. Raises ValueError on nonsense."""
    fields(meta, "bits", "group_size")
    return [grids.checked_grid(*matrix(shape), meta["bits"], meta["group_size"])]
