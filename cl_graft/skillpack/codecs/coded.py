"""`coded`: a tensor as whole numbers, one step a row, rows of zeros left out; entropy-coded or packed.

meta: kept, gap (as of `sparse`, of the rows), columns (1 where columns have sizes of their own), and how the rows of
codes lie (coded_rows.py); parts: steps (kept,), columns (n,) or none, index, kinds, codes. A row is what the first
index names; a vector is one row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import coded_rows, packing
from cl_graft.skillpack.codecs.codec import Relaid, Scattered, register
from cl_graft.skillpack.codecs.coded_rows import CodeLayout
from cl_graft.skillpack.codecs.encoded import Encoded, Layout, Meta, fields, rounded, whole


def coded(
    codes: Tensor,
    steps: Tensor,
    shape: tuple[int, ...],
    layout: CodeLayout = "small",
    columns: Tensor | None = None,
) -> Encoded:
    """delta[i, j] = codes[i, j] * (steps[i] * columns[j]). codes: int16 (rows, n); steps: (rows,) and columns: (n,) or
    None for ones, rounded to bfloat16; shape: that of the tensor, of as many elements. Raises ValueError where they do
    not fit together.
    """
    if codes.shape != _rows(shape) or steps.shape != codes.shape[:1]:
        raise ValueError(
            f"codes {tuple(codes.shape)} and steps {tuple(steps.shape)} are not of {shape}."
        )
    alive = codes.any(1).nonzero().reshape(-1)
    gap, index = packing.pack_index(alive, len(codes))
    parts, meta = coded_rows.write([codes[alive]], layout)
    sizes = torch.empty(0) if columns is None else columns
    parts = {
        "steps": rounded(steps[alive], torch.bfloat16, "a step"),
        "columns": rounded(sizes, torch.bfloat16, "the size of a column"),
        "index": index,
    } | parts
    head: Meta = {"kept": len(alive), "columns": int(columns is not None)}
    head |= {"gap": gap} if gap else {}
    return Encoded(CodedCodec.name, tuple(shape), head | meta, parts)


@register
class CodedCodec(Scattered, Relaid):
    name = "coded"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        gap = ["gap"] if "gap" in meta else []
        fields(meta, "kept", "columns", *gap, *coded_rows.fields_of(meta))
        rows, n = _rows(shape)
        kept = whole(meta["kept"], "kept", 0, rows)
        index = packing.packed_bytes(rows, 1)
        if "gap" in meta:
            index = packing.gap_bytes(meta["gap"], rows)
        return {
            "steps": (torch.bfloat16, (kept,)),
            "columns": (torch.bfloat16, (n * whole(meta["columns"], "columns", 0, 1),)),
            "index": (torch.uint8, (index,)),
        } | coded_rows.layout_of([(kept, n)], meta, rows * n == 0)

    def check(self, encoded: Encoded) -> None:
        alive_rows(encoded)
        size = encoded.meta["kept"], _rows(encoded.shape)[1]
        coded_rows.check(encoded.parts, [size], encoded.meta)

    def entries(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        alive, codes = alive_rows(encoded), codes_of(encoded)
        row, column = codes.nonzero(as_tuple=True)
        sizes = encoded.parts["steps"].float()[row]
        if encoded.meta["columns"]:
            sizes = sizes * encoded.parts["columns"].float()[column]
        values = codes[row, column].float() * sizes
        return alive[row] * codes.shape[1] + column, values

    def decode(self, encoded: Encoded) -> Tensor:
        delta = torch.zeros(_rows(encoded.shape))
        sizes = encoded.parts["steps"].float()[:, None]
        if encoded.meta["columns"]:
            sizes = sizes * encoded.parts["columns"].float()
        delta[alive_rows(encoded)] = codes_of(encoded).float() * sizes
        return delta.view(encoded.shape)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 8 * meta["bytes"]

    def codes(self, encoded: Encoded) -> list[Tensor]:
        return [codes_of(encoded)]

    def relaid(self, encoded: Encoded, layout: CodeLayout) -> Encoded:
        parts, meta = coded_rows.write([codes_of(encoded)], layout)
        kept = {name: encoded.parts[name] for name in ("steps", "columns", "index")}
        head = {
            name: encoded.meta[name] for name in ("kept", "columns", "gap") if name in encoded.meta
        }
        return Encoded(self.name, encoded.shape, head | meta, kept | parts)


def _rows(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows, and elements of each."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, math.prod(shape))


def alive_rows(encoded: Encoded) -> Tensor:
    """The rows that are stored, int64. Raises ValueError on a bad index."""
    rows, kept = _rows(encoded.shape)[0], encoded.meta["kept"]
    alive = packing.unpack_index(encoded.parts["index"], encoded.meta.get("gap"), rows)
    if len(alive) != kept:
        raise ValueError(f"{len(alive)} rows are named, and {kept} are stored.")
    return alive


def codes_of(encoded: Encoded) -> Tensor:
    """Codes of the rows that are stored, int16 (kept, n). Raises ValueError as `coded_rows.read` does."""
    size = encoded.meta["kept"], _rows(encoded.shape)[1]
    return coded_rows.read(encoded.parts, [size], encoded.meta)[0]
