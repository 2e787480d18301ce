"""A matrix delta as quantised low-rank factors: how many ranks at which precision, and the factors themselves.

Notation of the reference recipe: delta D (out, in), H = X^T X / n of the layer's inputs. The error that matters is
that of the layer's output, ||X D^T - X Dhat^T||^2 / n = trace((D - Dhat) H (D - Dhat)^T).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import (
    Encoded,
    Spec,
    quantized_low_rank,
    quantized_low_rank_spec,
)
from cl_graft.skillpack.codecs.quant import Quantized, round_to_nearest
from cl_graft.skillpack.compress.gptq import gptq_many, gptq_runs

Counts = dict[int, int]  # {bits: number of ranks}, precision falling


@dataclass(frozen=True)
class Spectrum:
    """Singular directions of one delta, from the eigenvectors of its smaller Gram matrix.

    energy: float64 (r,), falling: what dropping a rank costs in squared output error. Of directions that were
        not looked for it is extrapolated from their sum.
    basis: float32, of k <= r directions; where out <= in (out, k), orthonormal left factors U: right factors are
        U^T D. Else (k, in), the right factors themselves, from the eigenvectors of L^T D^T D L, H = L L^T.
    """

    energy: Tensor
    basis: Tensor
    wide: bool  # out <= in

    @property
    def directions(self) -> int:
        """How many there are; the energies may be of more."""
        return self.basis.shape[1 if self.wide else 0]

    def right(self, delta: Tensor, first: int) -> Tensor:
        """float32 (first, in): the leading right factors, unquantised."""
        return self.basis[:, :first].T @ delta if self.wide else self.basis[:first]

    def left(self, delta: Tensor, hessian: Tensor | None, first: int) -> Tensor:
        """float32 (out, first): what the right factors are multiplied by."""
        if self.wide:
            return self.basis[:, :first]
        read = self.basis[:first] if hessian is None else self.basis[:first] @ hessian
        return delta @ read.T


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H plus `damping` times its mean diagonal; what the spectrum and the least squares are taken under."""
    result = hessian.clone()
    result.diagonal().add_(damping * hessian.diagonal().mean().clamp_min(1e-12))
    return result


def spectrum(delta: Tensor, hessian: Tensor | None, most: int | None = None) -> Spectrum:
    """Activation-aware directions: SVD of D L with H = L L^T, so that truncation is optimal for the output.

    delta: float32 (out, in). hessian: (in, in), positive definite (`damped`), or None for the plain SVD of D,
    optimal for ||D||. most: how many directions are wanted; None for all. The Gram route: mostly matrix products, and
    one symmetric eigenproblem of the order of the smaller side, exact where the spectrum spans fewer than some three
    decades. Deterministic.
    """
    rows, cols = delta.shape
    if rows <= cols:
        read = delta if hessian is None else delta @ hessian
        energy, vectors = leading(_symmetric(read, delta.T), most)
        return Spectrum(energy, vectors.contiguous(), True)
    gram = _symmetric(delta.T, delta)
    if hessian is None:
        energy, vectors = leading(gram, most)
        return Spectrum(energy, vectors.T.contiguous(), False)
    root = torch.linalg.cholesky(hessian)
    energy, vectors = leading(_symmetric(root.T, gram @ root), most)
    right = torch.linalg.solve_triangular(root.T, vectors, upper=True).T
    return Spectrum(energy, right.contiguous(), False)


def _symmetric(left: Tensor, right: Tensor, strip: int = 512) -> Tensor:
    """The product left @ right, known to be symmetric: what lies left of the diagonal is copied, not multiplied."""
    size = len(left)
    product = left.new_empty(size, size)
    for start in range(0, size, strip):
        stop = min(start + strip, size)
        product[start:stop, start:] = left[start:stop] @ right[:, start:]
        product[stop:, start:stop] = product[start:stop, stop:].T
    return product


OVERSAMPLED = (
    1.25  # directions that are iterated for each that is wanted; the last of them converge late
)
WORTH_ITERATING = 0.36  # share of all directions from which all of them are found as quickly
SETTLED = (
    0.2  # of the energy not yet captured: a pass that gains less for the whole block is the last
)
PASSES = 6


def leading(gram: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """Eigenvalues, float64 (n,), falling, not below 0; the leading eigenvectors in the columns, float32.

    Block subspace iteration from random vectors (Halko, Martinsson and Tropp 2011, algorithm 4.4) where few are
    wanted; the eigenvalues after them are extrapolated. It ends when the energy captured settles, and all are found
    directly where it does not.
    """
    size = len(gram)
    wanted = size if most is None else min(size, most)
    block = math.ceil(OVERSAMPLED * wanted) + 8
    if block > WORTH_ITERATING * size:
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0).double().clamp_min(0.0), vectors.flip(1)[:, :wanted]
    g = torch.Generator().manual_seed(size)
    reached = gram @ torch.randn(size, block, generator=g).to(gram)
    total, captured = gram.diagonal().sum(dtype=torch.float64), -math.inf
    for _ in range(PASSES):
        basis = torch.linalg.qr(reached).Q
        reached, before = gram @ basis, captured
        captured = float((basis * reached).sum(dtype=torch.float64))
        if captured - before <= SETTLED * (float(total) - captured) + 1e-6 * float(total):
            break
    else:
        values, vectors = leading(gram, None)
        return values, vectors[:, :wanted]
    values, vectors = torch.linalg.eigh(basis.T @ reached)
    energy = values.flip(0)[:wanted].double().clamp_min(0.0)
    rest = _falling(float(energy[-1]), float(total - energy.sum()), size - wanted).to(energy)
    return torch.cat([energy, rest]), basis @ vectors.flip(1)[:, :wanted]


def _falling(last: float, total: float, count: int) -> Tensor:
    """float64 (count,): a geometric series from `last` on that adds up to `total`, or stays level at the most."""
    if last <= 0 or total <= 0:
        return torch.zeros(count, dtype=torch.float64)
    steps, low, high = torch.arange(1, count + 1, dtype=torch.float64), 0.0, 1.0
    for _ in range(60):
        ratio = (low + high) / 2
        over = last * float((ratio**steps).sum()) > total
        low, high = (low, ratio) if over else (ratio, high)
    return last * high**steps


def rank_for_energy(energy: Tensor, share: float) -> int:
    """Smallest rank whose cumulative energy reaches `share` of the total (paper: the MLP's conservative SVD)."""
    if energy.sum() <= 0:
        return 0
    cumulative = energy.cumsum(0) / energy.sum()
    return int((cumulative < share).sum().item()) + 1 if share < 1 else len(energy)


def spec_of(counts: Counts, shape: tuple[int, int], group_size: int) -> Spec:
    """Codec, shape and meta that `encode` will give, to know its bytes beforehand."""
    blank = [[k, bits, *(min(group_size, size) for size in shape)] for bits, k in counts.items()]
    return quantized_low_rank_spec(shape, blank)


class Factored(NamedTuple):
    """One matrix to encode: its delta (out, in), directions, and ranks at each precision."""

    delta: Tensor
    spectrum: Spectrum
    counts: Counts
    transposed: bool = False  # stored as (in, out)


def encode(
    matrices: Sequence[Factored],
    hessian: Tensor | None,
    *,
    group_size: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    aware: bool = True,
    refit: bool = True,
    polish: int = 0,
) -> list[Encoded]:
    """Quantise the factors of matrices that read the same inputs, of second moment `hessian` (in, in).

    All right factors go through one GPTQ solve under H, each rank at its own precision; without H they are rounded
    to nearest. Then, matrix by matrix, the left factor is solved anew by least squares against the delta (`refit`),
    which absorbs the right factor's rounding, and goes through a GPTQ solve under the second moment of what it
    reads, the most precise ranks first, so that what they leave is taken up by those after them. aware: whether
    the spectra were taken under H. polish: sweeps of coordinate descent (gptq.py); after the refit they gain nothing
    that could be measured.
    """
    options: dict[str, Any] = {"damping": damping, "polish": polish}
    pieces = [
        part
        for m in matrices
        for part in m.spectrum.right(m.delta, sum(m.counts.values())).split([*m.counts.values()])
    ]
    bits = [b for m in matrices for b in m.counts]
    size = min(group_size, matrices[0].delta.shape[1])
    if hessian is None:
        rights = [round_to_nearest(x, b, size) for x, b in zip(pieces, bits, strict=True)]
    else:
        rights = gptq_many(pieces, hessian, bits, group_size=size, act_order=act_order, **options)
        hessian = damped(hessian, damping)
    results = []
    for m in matrices:
        mine, rights = rights[: len(m.counts)], rights[len(m.counts) :]
        under = hessian if aware else None
        left = None if refit else m.spectrum.left(m.delta, under, sum(m.counts.values()))
        results.append(_with_left(m, mine, left, hessian, group_size, options))
    return results


def _with_left(
    m: Factored,
    rights: list[Quantized],
    left: Tensor | None,
    hessian: Tensor | None,
    group_size: int,
    options: dict[str, Any],
) -> Encoded:
    """Encode a matrix by its quantised right factors. left: unquantised, float32 (out, ranks); None is solved for."""
    read = torch.cat([right.dequantize() for right in rights])
    seen = read if hessian is None else read @ hessian
    moment = seen @ read.T
    if left is None:
        ridge = 1e-6 * moment.diagonal().double().mean().clamp_min(1e-30)
        eye = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
        root = torch.linalg.cholesky((moment.double() + moment.T.double()) / 2 + ridge * eye)
        left = torch.cholesky_solve((seen @ m.delta.T).double(), root).T.float()
    rows, cols = m.delta.shape
    lefts = gptq_runs(left, moment, m.counts, group_size=min(group_size, rows), **options)
    pairs = list(zip(lefts, rights, strict=True))
    if m.transposed:
        return quantized_low_rank([pair[::-1] for pair in pairs], (cols, rows))
    return quantized_low_rank(pairs, (rows, cols))
