"""`coded_low_rank`: a matrix as a product of factors of whole numbers, one scale a rank, entropy-coded or packed.

meta: rank, and how the rows of codes lie (coded_rows.py); parts: scales (rank,), kinds, codes. The rows are the shifts
of the right factor's columns (1, in) and of the left one's (1, out), then the right factor (rank, in), then the left
one's transpose (rank, out).
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

SHIFTED = 30  # the largest shift: what is decoded stays far from the ends of float32


def coded_low_rank(
    left: Tensor,
    right: Tensor,
    scales: Tensor,
    shape: tuple[int, ...],
    layout: CodeLayout = "small",
    shifts: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Encoded:
    """delta = left^T @ diag(scales) @ right, columns of a factor times 2**-shift. left: int16 (rank, out); right: int16
    (rank, in); scales: (rank,), rounded to bfloat16; shape: (out, in); shifts: of left and of right, int16 (out,) and
    (in,), -SHIFTED to SHIFTED, or None for zeros. Raises ValueError where they do not fit together.
    """
    if (left.shape, right.shape) != ((len(scales), shape[0]), (len(scales), shape[1])):
        raise ValueError(
            f"factors {tuple(left.shape)} and {tuple(right.shape)} are not of {shape}."
        )
    if 0 in shape:  # none is read of a matrix without an element
        shifts = None, None
    rows = [
        torch.zeros(1, n, dtype=torch.int16) if shift is None else shift.reshape(1, -1)
        for shift, n in zip(shifts, shape, strict=True)
    ]
    rows = [bounded(rows[1]), bounded(rows[0])]
    parts, meta = coded_rows.write([*rows, right, left], layout)
    parts = {"scales": rounded(scales, torch.bfloat16, "a scale")} | parts
    return Encoded(CodedLowRankCodec.name, tuple(shape), {"rank": len(scales)} | meta, parts)


@register
class CodedLowRankCodec(Factored, Relaid):
    name = "coded_low_rank"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "rank", *coded_rows.fields_of(meta))
        # what is decoded is then never larger than the matrix by more than its factors can be
        rank = whole(meta["rank"], "rank", 0, min(matrix(shape)))
        rows = coded_rows.layout_of(_sizes(shape, meta), meta, 0 in shape)
        return {"scales": (torch.bfloat16, (rank,))} | rows

    def check(self, encoded: Encoded) -> None:
        sizes = _sizes(encoded.shape, encoded.meta)
        for shifts in sum(coded_rows.check(encoded.parts, sizes, encoded.meta)[:2], []):
            bounded(shifts)

    def decode(self, encoded: Encoded) -> Tensor:
        return product(*factors_of(encoded))

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 8 * meta["bytes"]

    def rank(self, meta: Meta) -> int:
        return meta["rank"]

    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        """The scales go into the smaller factor: the other holds whole numbers times powers of two, up to 256 exact in
        bfloat16, too."""
        scale, (rows, cols) = encoded.parts["scales"], encoded.shape
        scales = [None, None] + ([None, scale] if rows <= cols else [scale, None])
        shifts = [torch.empty(1, cols), torch.empty(1, rows)]
        sizes, outs = _sizes(encoded.shape, encoded.meta), [*shifts, right, left.T]
        coded_rows.write_floats(encoded.parts, sizes, encoded.meta, scales, outs)
        for factor, shift in zip(outs[2:], shifts, strict=True):
            if shift.any():
                factor.mul_(torch.exp2(-bounded(shift)))

    def codes(self, encoded: Encoded) -> list[Tensor]:
        sizes = _sizes(encoded.shape, encoded.meta)
        return coded_rows.read(encoded.parts, sizes, encoded.meta)

    def relaid(self, encoded: Encoded, layout: CodeLayout) -> Encoded:
        left, right, scales, shifts = factors_of(encoded)
        return coded_low_rank(left, right, scales, encoded.shape, layout, shifts)


def factors_of(encoded: Encoded) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """What `coded_low_rank` was given: left, right, scales, shifts."""
    of_right, of_left, right, left = CodedLowRankCodec().codes(encoded)
    shifts = bounded(of_left)[0], bounded(of_right)[0]
    return left, right, encoded.parts["scales"], shifts


def product(left: Tensor, right: Tensor, scales: Tensor, shifts: tuple[Tensor, Tensor]) -> Tensor:
    """The matrix of these factors, float32 (out, in)."""
    return (_shifted(left, shifts[0]).T * scales.float()) @ _shifted(right, shifts[1])


def bounded(shifts: Tensor) -> Tensor:
    """The shifts. Raises ValueError where one is out of range."""
    # no magnitudes, for the least of int8 has none
    if shifts.numel() and not -SHIFTED <= int(shifts.min()) <= int(shifts.max()) <= SHIFTED:
        raise ValueError(f"a shift is not from -{SHIFTED} to {SHIFTED}.")
    return shifts


def _shifted(codes: Tensor, shifts: Tensor) -> Tensor:
    """codes * 2**-shifts, exact: float32."""
    return codes.float() * torch.exp2(-shifts.float()) if shifts.any() else codes.float()


def _sizes(shape: tuple[int, ...], meta: Meta) -> list[tuple[int, int]]:
    rows, cols = shape
    return [(1, cols), (1, rows), (meta["rank"], cols), (meta["rank"], rows)]
