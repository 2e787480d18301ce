"""Statistics of deltas: bits of codes, energy by direction, and what a difference in 16 bits is of the delta."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import Encoded, Relaid, codec_named, layout_name


def entropy(counts: Tensor) -> float:
    """Bits of all that was counted, at the least a code can take: n log2 n - sum of c log2 c. counts: (kinds,)."""
    there = counts[counts > 0].double()
    return float((there * (there.sum().log2() - there.log2())).sum())


def rows_of_codes(encoded: Encoded) -> list[tuple[Tensor, Tensor]]:
    """Matrices of codes of a tensor in the layout small, int16 (rows, n), and the classes of their rows."""
    codec = codec_named(encoded.codec)
    if not isinstance(codec, Relaid) or layout_name(encoded) != "small":
        return []
    matrices = codec.codes(encoded)
    kinds = encoded.parts["kinds"].split([len(matrix) for matrix in matrices])
    return list(zip(matrices, kinds, strict=True))


def bits_of_codes(rows: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, int]:
    """(bits, codes) of rows of whole numbers, given the class of each row: those of one class share a distribution.

    rows: codes int16 (rows, n) and classes uint8 (rows,), of any number of matrices. Rows of class 0 are zeros and
    count as nothing.
    """
    pooled: dict[int, list[Tensor]] = {}
    for codes, classes in rows:
        for kind in set(classes.tolist()) - {0}:
            pooled.setdefault(kind, []).append(codes[classes == kind].reshape(-1))
    bits, count = 0.0, 0
    for parts in pooled.values():
        mine = torch.cat(parts).long()
        if mine.numel():
            bits += entropy(torch.bincount(mine - mine.min()))
            count += mine.numel()
    return bits, count


def direction_energies(delta: Tensor) -> Tensor:
    """Squared singular values of a matrix, the largest first: float64 (smaller size,)."""
    x = delta.float()
    gram = x.T @ x if x.shape[0] > x.shape[1] else x @ x.T
    return torch.linalg.eigvalsh(gram.double()).clamp_min(0).flip(0)


def leading(energies: Tensor, share: float) -> float:
    """Energy of this share of the directions, the first ones: at least one. energies: (directions,), falling."""
    return float(energies[: max(1, round(share * len(energies)))].sum())


def bf16_difference(before: Tensor, after: Tensor) -> Tensor:
    """Both rounded to bfloat16, to nearest, and subtracted: float32, exact."""
    return after.bfloat16().float() - before.bfloat16().float()


@dataclass
class Beside:
    """Sums over tensors of what stands for a delta, beside the delta itself."""

    own: float = 0.0  # squares of what stands for it
    delta: float = 0.0  # squares of the delta
    along: float = 0.0  # products of both
    zeros: int = 0  # entries of what stands for it
    entries: int = 0

    def add(self, stand_in: Tensor, delta: Tensor) -> None:
        """Count a tensor; both of its shape."""
        x, d = stand_in.double(), delta.double()
        self.own += float(x.square().sum())
        self.delta += float(d.square().sum())
        self.along += float((x * d).sum())
        self.zeros += int((x == 0).sum())
        self.entries += x.numel()

    @property
    def energy(self) -> float:
        """Energy of what stands for the delta, over that of the delta."""
        return self.own / self.delta

    @property
    def projection(self) -> float:
        """Share of the delta that it holds: its projection on the delta, over the delta."""
        return self.along / self.delta

    @property
    def zero(self) -> float:
        """Share of entries that are exactly zero."""
        return self.zeros / self.entries
