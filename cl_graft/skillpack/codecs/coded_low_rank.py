"""`coded_low_rank`: a matrix as a product of factors of whole numbers, one scale a rank, entropy-coded or packed.

meta: rank, and how the rows of codes lie (coded_rows.py); parts: scales (rank,), kinds, codes. The rows are those of
the right factor (rank, in), then those of the left one's transpose (rank, out).
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import coded_rows
from cl_graft.skillpack.codecs.codec import Factored, Relaid, register
from cl_graft.skillpack.codecs.coded_rows import CodeLayout
from cl_graft.skillpack.codecs.encoded import (
    Encoded,
    Layout,
    Meta,
    fields,
    matrix,
    rounded,
    whole,
)


def coded_low_rank(
    left: Tensor,
    right: Tensor,
    scales: Tensor,
    shape: tuple[int, int],
    layout: CodeLayout = "small",
) -> Encoded:
    """delta = left^T @ diag(scales) @ right. left: int16 (rank, out); right: int16 (rank, in); scales: (rank,), which
    are rounded to bfloat16; shape: (out, in). Raises ValueError where they do not fit together.
    """
    if (left.shape, right.shape) != ((len(scales), shape[0]), (len(scales), shape[1])):
        raise ValueError(
            f"factors {tuple(left.shape)} and {tuple(right.shape)} are not of {shape}."
        )
    parts, meta = coded_rows.write([right, left], layout)
    parts = {"scales": rounded(scales, torch.bfloat16, "a scale")} | parts
    return Encoded(CodedLowRankCodec.name, tuple(shape), {"rank": len(scales)} | meta, parts)


@register
class CodedLowRankCodec(Factored, Relaid):
    name = "coded_low_rank"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "rank", *coded_rows.fields_of(meta))
        matrix(shape)
        rank = whole(meta["rank"], "rank", 0)
        return {"scales": (torch.bfloat16, (rank,))} | coded_rows.layout_of(
            _sizes(shape, meta), meta
        )

    def check(self, encoded: Encoded) -> None:
        coded_rows.check(encoded.parts, _sizes(encoded.shape, encoded.meta), encoded.meta)

    def decode(self, encoded: Encoded) -> Tensor:
        right, left = _codes(encoded)
        return (left.T.float() * encoded.parts["scales"].float()) @ right.float()

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 8 * meta["bytes"]

    def rank(self, meta: Meta) -> int:
        return meta["rank"]

    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        """The scales go into the smaller factor: the other holds whole numbers, up to 256 exact in bfloat16, too."""
        scale, sizes = encoded.parts["scales"], _sizes(encoded.shape, encoded.meta)
        rows, cols = encoded.shape
        scales = [None, scale] if rows <= cols else [scale, None]
        coded_rows.write_floats(encoded.parts, sizes, encoded.meta, scales, [right, left.T])

    def relaid(self, encoded: Encoded, layout: CodeLayout) -> Encoded:
        right, left = _codes(encoded)
        shape = encoded.shape[0], encoded.shape[1]
        return coded_low_rank(left, right, encoded.parts["scales"], shape, layout)


def _sizes(shape: tuple[int, ...], meta: Meta) -> list[tuple[int, int]]:
    return [(meta["rank"], shape[1]), (meta["rank"], shape[0])]


def _codes(encoded: Encoded) -> list[Tensor]:
    """Right (rank, in) and left (rank, out), int16."""
    return coded_rows.read(encoded.parts, _sizes(encoded.shape, encoded.meta), encoded.meta)
