"""Matrices as whole numbers: how coarse they may be at a price of a byte, and the numbers themselves.

One length `step`, in the square root of the loss, rules everything: every code loses step**2 / 12 of it at high rates,
so that a byte buys the same wherever it is spent, among tensors, ranks and entries alike (reverse water-filling). What
is worth less than that becomes zeros by itself, and zeros cost next to nothing under an entropy coder.

Steps are the same for all columns of a right factor, but those of massive activations. WaterSIC (arXiv 2603.04956)
gives column i the step c / L_ii, which is better where each column has a distribution of its own; here codes are told
apart by rows, and one step of equal mean square loss measured the same error at fewer bytes. A column whose step would
be several octaves finer has it finer by whole octaves: else it would make all others as fine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import (
    CodeLayout,
    Encoded,
    Meta,
    coded_low_rank,
    coded_low_rank_stack,
)
from cl_graft.skillpack.codecs.coded_low_rank import SHIFTED, factors_of
from cl_graft.skillpack.codecs.coded_low_rank_stack import matrices_of
from cl_graft.skillpack.codecs.entropy import TOP
from cl_graft.skillpack.compress.factorise import Spectrum
from cl_graft.skillpack.compress.gptq import factorised
from cl_graft.skillpack.compress.solve import dead_zone, rounded, solve_left, solve_right

WORTH = 0.5  # of a step, the least root mean square of the shorter side's entries that a rank is kept for
RANK_BYTES = 4.0  # of a rank, beside its codes
LARGEST = (
    1500.0  # root mean square of a right factor's codes at most: what is larger has a coarser step
)
NOISE = (
    2.0**-23
)  # of the energy of the largest rank: what a Gram matrix in float32 knows nothing of
FINEST = 12e3  # of the largest rank's root mean square, the least step: what is finer drowns in that noise
OUTLIER = 4.0  # times the usual pivot, from which a column has a finer step
GRID = torch.arange(-320.0, 161.0) / 4  # log2 of steps at which bytes are told
OCTAVES = 24  # below the step at which the first row is kept


@dataclass(frozen=True)
class Rate:
    """What a tensor takes at each step: float64 (len(GRID),), falling; largest: mean abs of its largest row's entries
    in the square root of the loss."""

    bytes: Tensor
    largest: float

    def at(self, step: float) -> float:
        """About the bytes at this step."""
        place = min(max(4 * (math.log2(step) + 80), 0.0), len(GRID) - 1.0)
        low = min(int(place), len(GRID) - 2)
        return float(self.bytes[low] + (place - low) * (self.bytes[low + 1] - self.bytes[low]))

    def step(self, bytes: float) -> float:
        """The least step at which this takes no more bytes."""
        if bytes >= float(self.bytes[0]):
            return 2.0 ** float(GRID[0])
        high = int((self.bytes > bytes).sum())  # falling: the first that fits
        if high == len(GRID):
            return 2.0 ** float(GRID[-1])
        fine, coarse = float(self.bytes[high - 1]), float(self.bytes[high])
        return 2.0 ** float(GRID[high] - (bytes - coarse) / (fine - coarse) / 4)


def rate_of(cost: Callable[[Tensor], Tensor], coarsest: float, largest: float) -> Rate:
    """The rate of a tensor that takes `cost(steps)` bytes, and none from the step `coarsest` on; cost: float64 (n,) to
    (n,)."""
    found = torch.zeros(len(GRID), dtype=torch.float64)
    if not coarsest > 0:
        return Rate(found, 0.0)
    last = min(int(max((math.log2(coarsest) + 80) * 4, 0)) + 1, len(GRID) - 1)
    first = last - 2 * min(last // 2, 2 * OCTAVES)
    found[first : last + 1 : 2] = cost(torch.exp2(GRID[first : last + 1 : 2].double()))
    found[first + 1 : last : 2] = (found[first:last:2] + found[first + 2 : last + 1 : 2]) / 2
    found[:first] = found[first]
    return Rate(found, largest)


def bits_of(magnitude: Tensor, layout: CodeLayout) -> Tensor:
    """Bits of a code of rows of this mean magnitude, float64."""
    return _bits_packed(magnitude) if layout == "fast" else _bits_coded(magnitude)


def _geometric(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """(q, mean abs code) of the codes of values of exponential magnitude, with their dead zone."""
    m = magnitude.clamp(1e-3, 1e6)
    edge = 0.5 + dead_zone(m)
    mean = torch.exp(-edge / m) / -torch.expm1(-1 / m)
    return ((1 + mean * mean).sqrt() - 1) / mean.clamp_min(1e-30), mean


def _bits_coded(magnitude: Tensor) -> Tensor:
    """Bits of a code under a geometric distribution."""
    q, mean = _geometric(magnitude)
    q = q.clamp(1e-30, 1 - 1e-12)
    return -((1 - q) / (1 + q)).log2() - mean * q.log2()


def _bits_packed(magnitude: Tensor) -> Tensor:
    """Bits of a code at the width that its row needs."""
    top = 5.5 * magnitude
    return 2.0 + 2 * (top > 1.5) + 4 * (top > 7.5) + 8 * (top > 127.5)


class Weighted(NamedTuple):
    """A matrix to be coded. delta: float32 (out, in); spectrum: under H; slope: what a squared unit of output costs."""

    delta: Tensor
    spectrum: Spectrum
    slope: float
    transposed: bool = False  # stored as (in, out)


def column_shifts(root: Tensor) -> tuple[Tensor, float]:
    """(shifts int64 (n,), unit): column j has the step 2**-shift, and a unit of one entry so stepped costs unit**2 on
    average, all entries before it made up for. root: the Cholesky factor of the second moment (n, n).
    """
    pivots = root.diagonal().double()
    typical = pivots.minimum(OUTLIER * pivots.median()).square().mean().sqrt()
    octaves = (pivots / typical).log2()
    shifts = torch.where(octaves > math.log2(OUTLIER), octaves.round(), 0.0).clamp_(0, SHIFTED)
    return shifts.long(), float((pivots * torch.exp2(-shifts)).square().mean().sqrt())


def matrix_rate(matrix: Weighted, hessian: Tensor | None, pivot: float, layout: CodeLayout) -> Rate:
    """The rate of a matrix's ranks. hessian: damped; pivot: the unit of its `column_shifts`, 1 without."""
    energy = matrix.spectrum.energy.cpu() * matrix.slope
    count = min(matrix.spectrum.directions, int((energy > NOISE * energy[:1]).sum()))
    if not count:
        return Rate(torch.zeros(len(GRID), dtype=torch.float64), 0.0)
    right, left = _factors(matrix, hessian, count)
    known = torch.stack(
        [
            right.abs().mean(1).double().cpu() * (pivot * matrix.slope**0.5),
            left.abs().mean(0).double().cpu() * energy[:count].sqrt(),
        ]
    )
    # ranks whose directions were not looked for are taken to be like the last of those that were
    more = known[:, -1:] * (energy[count:] / energy[count - 1].clamp_min(1e-300)).sqrt()
    magnitudes = torch.cat([known, more], 1)
    lengths = matrix.delta.shape[::-1]
    worth = energy.sqrt() / (WORTH * min(lengths) ** 0.5)

    def cost(steps: Tensor) -> Tensor:
        alive, codes = worth > steps[:, None], torch.zeros_like(steps)
        for n, row in zip(lengths, magnitudes, strict=True):
            codes += n * (bits_of(row / steps[:, None], layout) * alive).sum(1)
        return codes / 8 + RANK_BYTES * alive.sum(1)

    return rate_of(cost, float(worth.max()), float(magnitudes.max()))


def _factors(matrix: Weighted, hessian: Tensor | None, count: int) -> tuple[Tensor, Tensor]:
    """(right (count, in), left (out, count)), left's columns orthonormal."""
    right = matrix.spectrum.right(matrix.delta, count)
    left = matrix.spectrum.left(matrix.delta, hessian, count)
    if matrix.spectrum.wide:
        return right, left
    size = matrix.spectrum.energy[:count].sqrt().clamp_min(1e-30).to(left)
    return right * size[:, None], left / size


def ranks_at(energy: Tensor, slope: float, shape: tuple[int, ...], step: float) -> int:
    """How many of a matrix's ranks (out, in) are worth keeping at a step. energy: float64 (r,), falling."""
    worth = (energy * slope).sqrt() / (WORTH * min(shape) ** 0.5)
    least = max(step, finest(energy, slope, shape))
    return int(((worth > least) & (energy > NOISE * energy[:1])).sum())


def finest(energy: Tensor, slope: float, shape: tuple[int, ...]) -> float:
    """The least step that a matrix (out, in) has a use for."""
    return float((energy[:1] * slope / min(shape)).sqrt().sum()) / FINEST


def encode_matrices(
    matrices: list[Weighted], under: Tensor | None, step: float, layout: CodeLayout
) -> list[Encoded | None]:
    """Matrices that read the same inputs at one step; None where nothing is kept. under: the second moment of the
    inputs (in, in), positive definite, that the spectra are under, or None.

    The right factors of all go through one solve, every column's rounding error made up for by the columns after it.
    Then, matrix by matrix, the left factor is solved anew by least squares against the delta, which takes up what
    became of the right one, and goes through a solve of its own under the second moment of what it reads.
    """
    at_least = [finest(m.spectrum.energy, m.slope, tuple(m.delta.shape)) for m in matrices]
    step, n = max([step, *at_least]), matrices[0].delta.shape[1]
    shifts, unit = torch.zeros(n, dtype=torch.long, device=matrices[0].delta.device), 1.0
    if under is not None:
        root = factorised(under, 0.0, scaled=False)[1]
        shifts, unit = column_shifts(root)
    counts, rights, sizes = [], [], []
    for m in matrices:
        wanted = ranks_at(m.spectrum.energy, m.slope, tuple(m.delta.shape), step)
        counts.append(min(wanted, m.spectrum.directions))
        right, _ = _factors(m, under, counts[-1])
        right = right * (m.slope**0.5 / step)
        # whole octaves, by which the left factor is then finer
        rms = right.square().mean(1).sqrt() * unit
        sizes.append(torch.exp2((rms / LARGEST).clamp_min(1.0).log2().ceil()))
        rights.append(right / sizes[-1][:, None])
    stacked = torch.cat(rights)
    if not len(stacked):
        return [None] * len(matrices)
    # no finer than its codes can say, with room for what other columns hand on
    most = (TOP / 2 / (stacked.abs().amax(0) * unit).clamp_min(1e-30)).log2().floor()
    shifts = shifts.minimum(most.long()).clamp_min(-SHIFTED)
    fineness = torch.exp2(shifts.float())
    if under is None:
        stacked = stacked * fineness
        codes = rounded(stacked, dead_zone(stacked.abs().mean(1))[:, None])
    else:
        codes = solve_right(stacked * unit, root / unit, fineness)
    results: list[Encoded | None] = []
    for m, mine, size in zip(matrices, codes.split(counts), sizes, strict=True):
        some = mine.any(1)
        mine, size = mine[some], size[some]
        results.append(
            _with_left(m, mine, size, shifts, under, step, unit, layout) if len(mine) else None
        )
    return results


def _with_left(
    m: Weighted,
    right: Tensor,
    coarser: Tensor,
    shifts: Tensor,
    under: Tensor | None,
    step: float,
    unit: float,
    layout: CodeLayout,
) -> Encoded | None:
    """Encode a matrix by the codes of its right factor, float32 (ranks, in), how many steps each rank's is, (ranks,),
    and the shifts of its columns (in,)."""
    size = coarser * (step / (m.slope**0.5 * unit))
    read = right * size[:, None] * torch.exp2(-shifts.float())
    seen = read if under is None else read @ under
    moment = seen @ read.T
    moment = (moment.double() + moment.T.double()) / 2
    moment.diagonal().add_(1e-6 * moment.diagonal().mean().clamp_min(1e-300))
    chol = torch.linalg.cholesky(moment)
    left = torch.cholesky_solve((seen @ m.delta.T).double(), chol).float()
    codes, scales = solve_left(left, moment.float(), step / m.slope**0.5, size)
    alive = codes.any(1)
    if not alive.any():
        return None
    left_codes, right_codes = (x[alive].to(torch.int16).cpu() for x in (codes, right))
    scales = scales[alive].cpu()
    rows, cols = m.delta.shape
    of_columns = shifts.to(torch.int16).cpu()
    if m.transposed:
        shape = cols, rows
        return coded_low_rank(right_codes, left_codes, scales, shape, layout, (of_columns, None))
    return coded_low_rank(left_codes, right_codes, scales, (rows, cols), layout, (None, of_columns))


def ranks_of(meta: Meta) -> int:
    """All ranks of a tensor that was encoded from matrices; 0 of another."""
    return sum(meta["ranks"]) if "ranks" in meta else meta.get("rank", 0)


def trimmed(encoded: Encoded) -> Encoded:
    """A tensor of matrices without the last sixteenth of the ranks of each."""
    layout = encoded.meta["layout"]
    if "ranks" in encoded.meta:
        matrices = [trimmed(matrix) for matrix in matrices_of(encoded)]
        return coded_low_rank_stack(matrices, encoded.shape, layout)
    left, right, scales, shifts = factors_of(encoded)
    ranks = len(scales) - math.ceil(len(scales) / 16)
    parts = left[:ranks], right[:ranks], scales[:ranks]
    return coded_low_rank(*parts, encoded.shape, layout, shifts)
