"""A matrix delta as quantised low-rank factors: how many ranks at which precision, and the factors themselves.

Notation of the reference recipe: delta D (out, in), H = X^T X / n of the layer's inputs. The error that matters is
that of the layer's output, ||X D^T - X Dhat^T||.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .codecs import Encoded, Spec, quantized_low_rank
from .gptq import gptq
from .quant import BITS, groups_in

# Share of a rank's energy that is lost at b bits; 0 bits drops the rank. Rate-distortion slope 4^-b.
LOSS = {0: 1.0, **{bits: min(1.0, 2.8 * 4.0**-bits) for bits in BITS}}


@dataclass(frozen=True)
class Spectrum:
    """Singular triplets of one delta, and what is needed to quantise them.

    energy: float64 (r,), falling: what dropping a rank costs in squared output error.
    right: float32 (r, in), unquantised right factors. left: float32 (out, r), delta = left @ right.
    """

    delta: Tensor
    hessian: Tensor
    energy: Tensor
    left: Tensor
    right: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        rows, cols = self.delta.shape
        return rows, cols


def spectrum(delta: Tensor, hessian: Tensor | None, damping: float = 0.01) -> Spectrum:
    """Activation-aware factors: SVD of D L with H + damping = L L^T, so that truncation is optimal for the output.

    delta: (out, in). hessian: (in, in), or None for the plain SVD of D, optimal for ||D||.
    """
    delta = delta.float()
    eye = torch.eye(delta.shape[1], device=delta.device)
    if hessian is None:
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        return Spectrum(delta, eye, values.double() ** 2, left * values, right)
    mean = hessian.diagonal().mean().clamp_min(1e-12)
    damped = hessian + damping * mean * eye
    root = torch.linalg.cholesky(damped.double())
    left, values, right = torch.linalg.svd((delta.double() @ root), full_matrices=False)
    right = torch.linalg.solve_triangular(root, right, upper=False, left=False)
    return Spectrum(delta, damped, values**2, (left * values).float(), right.float())


def rank_for_energy(energy: Tensor, share: float) -> int:
    """Smallest rank whose cumulative energy reaches `share` of the total (paper: the MLP's conservative SVD)."""
    if energy.sum() <= 0:
        return 0
    cumulative = energy.cumsum(0) / energy.sum()
    return int((cumulative < share).sum().item()) + 1 if share < 1 else len(energy)


def allocate(
    energy: Tensor, shape: tuple[int, int], price: float, group_size: int
) -> dict[int, int]:
    """{bits: number of ranks}, precision falling with the rank, that minimises error + price * bytes.

    price: squared output error that one byte is worth. Because every rank costs the same at the same
    bits, each chooses for itself, and bits never rise along the falling spectrum.
    """
    scales = groups_in(shape[0], group_size) + groups_in(shape[1], group_size)
    options = (0, *BITS)
    bytes_of = torch.tensor(
        [0.0 if not b else (b * sum(shape) + (16 + b) * scales) / 8 for b in options],
        dtype=torch.float64,
    )
    loss = torch.tensor([LOSS[b] for b in options], dtype=torch.float64)
    choice = (energy.cpu()[:, None] * loss + price * bytes_of).argmin(1)
    counts = {b: int((choice == i).sum()) for i, b in enumerate(options)}
    return {b: counts[b] for b in sorted(BITS, reverse=True) if counts[b]}


def spec_of(counts: dict[int, int], shape: tuple[int, int], group_size: int) -> Spec:
    """Codec, shape and meta that `encode` will give, to know its bytes beforehand."""
    blank = [[k, bits, *(min(group_size, size) for size in shape)] for bits, k in counts.items()]
    return "quantized_low_rank", shape, {"groups": blank}


def encode(
    found: Spectrum,
    counts: dict[int, int],
    *,
    group_size: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    refit: bool = True,
    transposed: bool = False,
) -> Encoded:
    """Quantise the ranks, the most precise group first.

    Right factors by GPTQ under H; left factors by GPTQ under the second moment of what they read. With
    `refit` each left factor is first solved anew, by least squares, against the residual that is left:
    that absorbs the right factor's rounding and the earlier groups' errors. `transposed` encodes the delta
    as (in, out).
    """
    residual, first, pairs = found.delta.clone(), 0, []
    options: dict[str, Any] = {"damping": damping, "act_order": act_order}
    for bits, count in counts.items():
        ranks = slice(first, first + count)
        size = min(group_size, found.delta.shape[1])
        right = gptq(found.right[ranks], found.hessian, bits, group_size=size, **options)
        read = right.dequantize()
        moment = read @ found.hessian @ read.T
        left = found.left[:, ranks]
        if refit:
            eye = torch.eye(count, device=moment.device) * moment.diagonal().mean().clamp_min(1e-20)
            target = residual @ found.hessian @ read.T
            left = torch.linalg.solve((moment + 1e-6 * eye).double(), target.T.double()).T.float()
        size = min(group_size, found.delta.shape[0])
        stored = gptq(left, moment, bits, group_size=size, group_axis="rows", **options)
        residual -= stored.dequantize().T @ read
        pairs.append((stored, right))
        first += count
    rows, cols = found.delta.shape
    if transposed:
        return quantized_low_rank([pair[::-1] for pair in pairs], (cols, rows))
    return quantized_low_rank(pairs, (rows, cols))
