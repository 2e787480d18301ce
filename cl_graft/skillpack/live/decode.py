"""Fast decoding: the factors of a low-rank delta, laid out for the product, and the entries of a sparse one.

`codecs.decode` is the reference. What is here gives the same numbers (in float32 the very same factors)
without ever holding the delta of the whole matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded, Factored, Scattered


class Factors(NamedTuple):
    """A matrix as left @ right, of one float dtype. left: (rows, r), a column after the other; right: (r, cols)."""

    left: Tensor
    right: Tensor

    def to(self, device: torch.device) -> Factors:
        """Move the factors to a device."""
        return Factors(self.left.to(device), self.right.to(device))

    def rows(self, ids: Tensor, cols: int) -> Tensor:
        """Rows `ids` (n,) of the matrix: float32 (n, cols)."""
        return self.left[ids].float() @ self.right.float()


class Entries(NamedTuple):
    """A tensor that is zero elsewhere. positions: int64 (kept,), strictly increasing, row-major; values: (kept,)."""

    positions: Tensor
    values: Tensor

    def to(self, device: torch.device) -> Entries:
        """Move the entries to a device."""
        return Entries(self.positions.to(device), self.values.to(device))

    def rows(self, ids: Tensor, cols: int) -> Tensor:
        """Rows `ids` (n,) of the matrix of `cols` columns with these entries: float32 (n, cols)."""
        starts = torch.searchsorted(self.positions, ids * cols)
        counts = torch.searchsorted(self.positions, (ids + 1) * cols) - starts
        row = torch.repeat_interleave(torch.arange(len(ids), device=ids.device), counts)
        ends = counts.cumsum(0)
        entry = torch.arange(len(row), device=ids.device) + (starts - ends + counts)[row]
        dense = torch.zeros(len(ids), cols, device=ids.device)
        dense[row, self.positions[entry] % cols] = self.values[entry].float()
        return dense

    def touched(self, cols: int) -> Tensor:
        """Rows of the matrix of `cols` columns that have an entry: int64, strictly increasing."""
        return (self.positions // max(1, cols)).unique_consecutive()

    def laid(self, cols: int, dtype: torch.dtype) -> Rows:
        """The matrix of `cols` columns with these entries, rounded to `dtype`, as those rows of it that have one."""
        ids, row = (self.positions // max(1, cols)).unique_consecutive(return_inverse=True)
        dense = torch.zeros(len(ids), cols, dtype=dtype, device=ids.device)
        dense[row, self.positions % max(1, cols)] = self.values.to(dtype)
        return Rows(ids, dense)


class Rows(NamedTuple):
    """A matrix that is zero in all other rows. ids: int64 (k,), strictly increasing; values: (k, cols)."""

    ids: Tensor
    values: Tensor

    def rows(self, ids: Tensor, cols: int) -> Tensor:
        """Rows `ids` (n,) of the matrix: float32 (n, cols)."""
        place = torch.searchsorted(self.ids, ids)
        there = torch.cat([self.ids, self.ids.new_tensor([-1])])[place] == ids
        dense = torch.zeros(len(ids), cols, device=ids.device)
        dense[there] = self.values[place[there]].float()
        return dense

    def entries(self) -> Entries:
        """The matrix as its entries."""
        row, column = self.values.nonzero(as_tuple=True)
        return Entries(self.ids[row] * self.values.shape[1] + column, self.values[row, column])


def factors(parts: Sequence[Encoded], dtype: torch.dtype = torch.float32) -> Factors:
    """The factors of the sum of the deltas of `parts`, side by side: their rank is the sum of the ranks.

    parts: one or more of one shape, of codecs that store factors. dtype: what every entry, computed in
    float32, is rounded to, once. Raises ValueError as `codecs.check` does, and for another codec.
    """
    for encoded in parts:
        codecs.check_parts(encoded)
    (rows, cols), ranks = parts[0].shape, [codecs.rank_of(encoded) or 0 for encoded in parts]
    rank = sum(ranks)
    # codecs store the left factor by columns, and products read it in either order at one speed
    left, right = torch.empty(rank, rows, dtype=dtype).T, torch.empty(rank, cols, dtype=dtype)
    first = 0
    for encoded, count in zip(parts, ranks, strict=True):
        mine = slice(first, first + count)
        codec = codecs.codec_named(encoded.codec)
        if not isinstance(codec, Factored):
            raise ValueError(f"codec {encoded.codec} stores no factors.")
        codec.write_factors(encoded, left[:, mine], right[mine])
        first = mine.stop
    return Factors(left, right)


def side_by_side(pairs: Sequence[Factors]) -> Factors:
    """The factors of the sum of matrices."""
    if len(pairs) == 1:
        return pairs[0]
    return Factors(torch.cat([p.left.T for p in pairs]).T, torch.cat([p.right for p in pairs]))


def entries(encoded: Encoded) -> Entries:
    """The entries of a sparse delta. Raises ValueError as `codecs.check` does, and for another codec."""
    codecs.check_parts(encoded)
    codec = codecs.codec_named(encoded.codec)
    if not isinstance(codec, Scattered):
        raise ValueError(f"codec {encoded.codec} stores no positions.")
    return Entries(*codec.entries(encoded))
