"""`coded_table`: a table as a product of factors of whole numbers and, for some rows, whole numbers of their own.

meta: rank, kept, perhaps gap (as of `sparse`, of the rows), and how the rows of codes lie (coded_rows.py); parts:
scales (rank + 1,), the last that of the rows' own codes, index, kinds, codes. The rows are the shifts of the columns
(1, cols) and of the rows (1, rows), then the right factor (rank, cols), the left one's transpose (rank, rows), and the
rows' own codes (kept, cols), none of which are all zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import coded_rows, packing
from cl_graft.skillpack.codecs.codec import Factored, Relaid, Scattered, register
from cl_graft.skillpack.codecs.coded import alive_rows
from cl_graft.skillpack.codecs.coded_low_rank import bounded, product
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

ZEROS = "a row is stored whose own codes are all zero."


def coded_table(
    left: Tensor,
    right: Tensor,
    scales: Tensor,
    shifts: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    layout: CodeLayout = "small",
) -> Encoded:
    """delta = left^T @ diag(scales[:rank]) @ right, plus scales[rank] * codes in the rows that have codes of their own;
    all of it times 2**-shift of the row and of the column.

    left: int16 (rank, rows); right: int16 (rank, cols); scales: (rank + 1,), rounded to bfloat16; shifts: of rows and
    of columns, int16 (rows,) and (cols,), -SHIFTED to SHIFTED (coded_low_rank.py); own: which rows, int64 (kept,),
    increasing, and their codes, int16 (kept, cols), of which rows of zeros are left out. Raises ValueError where they
    do not fit together.
    """
    alive, codes = own
    rank, (rows, cols) = len(scales) - 1, (len(shift) for shift in shifts)
    given = [tuple(x.shape) for x in (left, right, codes)]
    if given != [(rank, rows), (rank, cols), (len(alive), cols)]:
        raise ValueError(f"factors and codes {given} are not of a rank {rank} and {(rows, cols)}.")
    alive, codes = alive[codes.any(1)], codes[codes.any(1)]
    ends = torch.cat([alive.new_tensor([-1]), alive, alive.new_tensor([rows])])
    if not (ends.diff() > 0).all():
        raise ValueError(f"rows of their own codes do not increase from 0 to {rows - 1}.")
    if not rows * cols:  # nothing is read of a table without an element
        shifts = 0 * shifts[0], 0 * shifts[1]
    gap, index = packing.pack_index(alive, rows)
    of_rows, of_columns = (bounded(shift.reshape(1, -1)) for shift in shifts)
    lies, meta = coded_rows.write([of_columns, of_rows, right, left, codes], layout)
    parts = {"scales": rounded(scales, torch.bfloat16, "a scale"), "index": index} | lies
    head: Meta = {"rank": rank, "kept": len(alive)} | ({"gap": gap} if gap else {})
    return Encoded(CodedTableCodec.name, (rows, cols), head | meta, parts)


@register
class CodedTableCodec(Factored, Scattered, Relaid):
    name = "coded_table"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        gap = ["gap"] if "gap" in meta else []
        fields(meta, "rank", "kept", *gap, *coded_rows.fields_of(meta))
        rows, cols = matrix(shape)
        # what is decoded is then never larger than the table by more than its factors can be
        rank = whole(meta["rank"], "rank", 0, min(shape))
        whole(meta["kept"], "kept", 0, rows if cols else 0)
        index = packing.packed_bytes(rows, 1)
        if "gap" in meta:
            index = packing.gap_bytes(meta["gap"], rows)
        return {
            "scales": (torch.bfloat16, (rank + 1,)),
            "index": (torch.uint8, (index,)),
        } | coded_rows.layout_of(_sizes(shape, meta), meta, 0 in shape)

    def check(self, encoded: Encoded) -> None:
        alive_rows(encoded)
        sizes = _sizes(encoded.shape, encoded.meta)
        for shifts in sum(coded_rows.check(encoded.parts, sizes, encoded.meta)[:2], []):
            bounded(shifts)
        # in a stream a row of another class may be one, too
        kept = encoded.meta["kept"]
        if kept and not encoded.parts["kinds"][-kept:].all():
            raise ValueError(ZEROS)

    def decode(self, encoded: Encoded) -> Tensor:
        found = self.codes(encoded)
        of_columns, of_rows, right, left, _ = found
        shifts = bounded(of_rows)[0], bounded(of_columns)[0]
        delta = product(left, right, encoded.parts["scales"][:-1], shifts)
        positions, values = _entries(encoded, found)
        delta.view(-1)[positions] += values
        return delta

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 8 * meta["bytes"]

    def rank(self, meta: Meta) -> int:
        return meta["rank"]

    def write_factors(self, encoded: Encoded, left: Tensor, right: Tensor) -> None:
        """The scales go into the right factor."""
        of_columns, of_rows, right_codes, left_codes, _ = self.codes(encoded)
        scales = encoded.parts["scales"][:-1].float()[:, None]
        left.copy_((left_codes * torch.exp2(-bounded(of_rows).float())).T)
        right.copy_(right_codes * scales * torch.exp2(-bounded(of_columns).float()))

    def entries(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        return _entries(encoded, self.codes(encoded))

    def codes(self, encoded: Encoded) -> list[Tensor]:
        found = coded_rows.read(encoded.parts, _sizes(encoded.shape, encoded.meta), encoded.meta)
        if not found[-1].any(1).all():
            raise ValueError(ZEROS)
        return found

    def relaid(self, encoded: Encoded, layout: CodeLayout) -> Encoded:
        parts, meta = coded_rows.write(self.codes(encoded), layout)
        kept = {name: encoded.parts[name] for name in ("scales", "index")}
        head = {n: encoded.meta[n] for n in ("rank", "kept", "gap") if n in encoded.meta}
        return Encoded(self.name, encoded.shape, head | meta, kept | parts)


def _entries(encoded: Encoded, found: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Positions and values of the rows' own codes. found: what `codes` gives."""
    of_columns, of_rows, _, _, own = found
    alive = alive_rows(encoded)
    row, column = own.nonzero(as_tuple=True)
    shift = bounded(of_rows)[0, alive[row]] + bounded(of_columns)[0, column]
    values = own[row, column] * encoded.parts["scales"][-1].float() * torch.exp2(-shift.float())
    return alive[row] * own.shape[1] + column, values


def _sizes(shape: tuple[int, ...], meta: Meta) -> list[tuple[int, int]]:
    rows, cols = shape
    rank = meta["rank"]
    return [(1, cols), (1, rows), (rank, cols), (rank, rows), (meta["kept"], cols)]
