"""`coded_low_rank_stack`: a stack of matrices, each as of `coded_low_rank`, as of the experts of a layer.

meta: ranks, of each matrix, and how the rows of codes lie (coded_rows.py); parts: scales (all ranks,), kinds, codes.
The rows are the shifts of the right factors' columns (stack, cols) and of the left ones' (stack, rows), then the right
factors one after the other (all ranks, cols), then the left ones' transposes (all ranks, rows).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import coded_rows
from cl_graft.skillpack.codecs.codec import Relaid, register
from cl_graft.skillpack.codecs.coded_low_rank import bounded, coded_low_rank, factors_of, product
from cl_graft.skillpack.codecs.coded_rows import CodeLayout
from cl_graft.skillpack.codecs.encoded import Encoded, Layout, Meta, fields, short, whole, wholes


def coded_low_rank_stack(
    matrices: Sequence[Encoded | None], shape: tuple[int, ...], layout: CodeLayout = "small"
) -> Encoded:
    """Stack matrices of `coded_low_rank`, all of shape[1:]; None is one of zeros. shape: (stack, rows, cols).

    Raises ValueError where they do not fit together.
    """
    none = torch.zeros(0, shape[1], dtype=torch.int16), torch.zeros(0, shape[2], dtype=torch.int16)
    empty = coded_low_rank(*none, torch.zeros(0), shape[1:], "fast")
    every = [empty if one is None else one for one in matrices]
    if not every or len(every) != shape[0] or any(one.spec[:2] != empty.spec[:2] for one in every):
        raise ValueError(f"{len(every)} matrices are not a stack of {shape}.")
    left, right, scales, shifts = zip(*map(factors_of, every), strict=True)
    of_left, of_right = (torch.stack(each) for each in zip(*shifts, strict=True))
    rows = [of_right, of_left, torch.cat(right), torch.cat(left)]
    parts, meta = coded_rows.write(rows, layout)
    head: Meta = {"ranks": [one.meta["rank"] for one in every]}
    parts = {"scales": torch.cat(scales)} | parts
    return Encoded(CodedLowRankStackCodec.name, tuple(shape), head | meta, parts)


@register
class CodedLowRankStackCodec(Relaid):
    name = "coded_low_rank_stack"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "ranks", *coded_rows.fields_of(meta))
        if len(shape) != 3:
            raise ValueError(f"shape {short(shape)} is not that of a stack of matrices.")
        ranks = wholes(meta["ranks"], shape[0], "ranks")
        for rank in ranks:
            whole(rank, "a rank", 0, min(shape[1:]))
        rows = coded_rows.layout_of(_sizes(shape, meta), meta, 0 in shape)
        return {"scales": (torch.bfloat16, (sum(ranks),))} | rows

    def check(self, encoded: Encoded) -> None:
        sizes = _sizes(encoded.shape, encoded.meta)
        for shifts in sum(coded_rows.check(encoded.parts, sizes, encoded.meta)[:2], []):
            bounded(shifts)

    def decode(self, encoded: Encoded) -> Tensor:
        delta = torch.zeros(encoded.shape)
        for matrix, factors in zip(delta, _each(encoded), strict=True):
            if len(factors[2]):
                matrix.copy_(product(*factors))
        return delta

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 8 * meta["bytes"]

    def codes(self, encoded: Encoded) -> list[Tensor]:
        return coded_rows.read(encoded.parts, _sizes(encoded.shape, encoded.meta), encoded.meta)

    def relaid(self, encoded: Encoded, layout: CodeLayout) -> Encoded:
        parts, meta = coded_rows.write(self.codes(encoded), layout)
        parts = {"scales": encoded.parts["scales"]} | parts
        return Encoded(self.name, encoded.shape, {"ranks": encoded.meta["ranks"]} | meta, parts)


def matrices_of(encoded: Encoded) -> list[Encoded]:
    """The matrices of a `coded_low_rank_stack`, each as `coded_low_rank` of the layout "fast"."""
    return [
        coded_low_rank(left, right, scales, encoded.shape[1:], "fast", shifts)
        for left, right, scales, shifts in _each(encoded)
    ]


def _each(encoded: Encoded) -> list[tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]]:
    """Read left, right, scales and shifts of each matrix, as `factors_of` does."""
    of_right, of_left, right, left = CodedLowRankStackCodec().codes(encoded)
    ranks = encoded.meta["ranks"]
    factors = (x.split(ranks) for x in (left, right, encoded.parts["scales"]))
    shifts = zip(bounded(of_left), bounded(of_right), strict=True)
    return list(zip(*factors, shifts, strict=True))


def _sizes(shape: tuple[int, ...], meta: Meta) -> list[tuple[int, int]]:
    stack, rows, cols = shape
    ranks = sum(meta["ranks"])
    return [(stack, cols), (stack, rows), (ranks, cols), (ranks, rows)]
