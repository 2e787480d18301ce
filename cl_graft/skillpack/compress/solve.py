"""Factors of matrices as whole numbers, what one code misses made up for by those after it (GPTQ, arXiv 2210.17323).

By torch, or for large factors on the CPU by loops that numba compiles (compiled.py), in a fraction of the time.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from cl_graft.skillpack.codecs.entropy import TOP
from cl_graft.skillpack.compress.gptq import factorised
from cl_graft.skillpack.threads import in_threads

BIT = 0.05  # of a step: how much further from its code a value may be for each bit that this saves
LEFT_DAMPING = 1e-4
BLOCK = 64  # columns, or ranks, that are solved one after the other before the rest hears of them
WORTH_COMPILING = 1 << 14  # entries of a factor: loading what is compiled takes about a second
ROWS = 1024  # of a block, from which a thread more gains


def dead_zone(magnitude: Tensor) -> Tensor:
    """How much less than a half rounds to the next code: BIT for each bit between neighbouring codes of a row."""
    m = magnitude.clamp_min(1e-4)
    q = ((1 + m * m).sqrt() - 1) / m
    return (BIT * -q.log2()).clamp_(max=0.35)


def rounded(x: Tensor, zone: Tensor) -> Tensor:
    """The codes of values in units of a step, as floats."""
    return x.sign() * (x.abs() + (0.5 - zone)).floor_().clamp_(0, TOP)


def solve_right(x: Tensor, root: Tensor, fineness: Tensor) -> Tensor:
    """Codes, as floats (rows, n), of rows in units of the step, one column after the other.

    root: float32 (n, n), upper triangular, R R^T the second moment. fineness: float32 (n,), by how much the step of
    each column is finer.
    """
    columns, zone = x.T.contiguous(), dead_zone(x.abs().mean(1))
    codes, missing = torch.empty_like(columns), torch.empty_like(columns)
    pivots, terms = root.diagonal().contiguous(), torch.zeros_like(columns)
    block = _right_compiled if _compiled(x) else _right_block
    for start in range(0, len(columns), BLOCK):
        mine = slice(start, min(start + BLOCK, len(columns)))
        inner, out = root[mine, mine].T.contiguous(), (codes[mine], missing[mine])
        block(columns[mine], terms[mine], inner, pivots[mine], fineness[mine], zone, out)
        terms[mine.stop :].addmm_(root[mine, mine.stop :].T, missing[mine])
    return codes.T.contiguous()


def _right_block(
    x: Tensor,
    terms: Tensor,
    inner: Tensor,
    pivots: Tensor,
    finer: Tensor,
    zone: Tensor,
    out: tuple[Tensor, Tensor],
) -> None:
    """Fill `out` for a block of columns: codes and what they miss, float32 (b, rows)."""
    codes, missing = out
    for j, (pivot, fine) in enumerate(zip(pivots.tolist(), finer.tolist(), strict=True)):
        fed = torch.addmv(terms[j], missing[:j].T, inner[j, :j]) if j else terms[j]
        wanted = torch.add(x[j], fed, alpha=1 / pivot)
        codes[j] = rounded(wanted.mul_(fine), zone)
        torch.sub(x[j], codes[j], alpha=1 / fine, out=missing[j])


def _right_compiled(
    x: Tensor,
    terms: Tensor,
    inner: Tensor,
    pivots: Tensor,
    finer: Tensor,
    zone: Tensor,
    out: tuple[Tensor, Tensor],
) -> None:
    from cl_graft.skillpack.compress.compiled import right_block

    given = [each.numpy() for each in (x, terms, inner, pivots, finer, zone)]
    found = [each.numpy() for each in out]

    def run(rows: slice) -> None:
        right_block(*given, np.float32(TOP), *found, rows.start, rows.stop)

    in_threads(run, x.shape[1], least=ROWS)


def _compiled(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() >= WORTH_COMPILING


def solve_left(left: Tensor, moment: Tensor, step: float, size: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, as floats (ranks, out); scales, float32 (ranks,)) of a left factor (ranks, out): left is near
    codes * scales / size, (ranks,), and the scales are in bfloat16 already.

    moment: float32 (ranks, ranks), of what it reads. Every rank has the step at which each loses the same, and the
    scale that fits its codes best.
    """
    _, root = factorised(moment, LEFT_DAMPING, scaled=False)
    pivots, left = root.diagonal().contiguous(), left.contiguous()
    codes, missing = torch.empty_like(left), torch.empty_like(left)
    scales, terms = torch.zeros(len(left), device=left.device), torch.zeros_like(left)
    block = _left_compiled if _compiled(left) else _left_block
    for start in range(0, len(left), BLOCK):
        mine = slice(start, min(start + BLOCK, len(left)))
        inner = root[mine, mine].T.contiguous()
        out = codes[mine], missing[mine], scales[mine]
        block(left[mine], terms[mine], inner, pivots[mine], size[mine], step, out)
        terms[mine.stop :].addmm_(root[mine, mine.stop :].T, missing[mine])
    return codes, scales


def _left_block(
    left: Tensor,
    terms: Tensor,
    inner: Tensor,
    pivots: Tensor,
    size: Tensor,
    step: float,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Fill `out` for a block of ranks: codes and what they miss, float32 (b, out); scales, (b,)."""
    codes, missing, scales = out
    for j, pivot in enumerate(pivots.tolist()):
        fed = torch.addmv(terms[j], missing[:j].T, inner[j, :j]) if j else terms[j]
        wanted = torch.add(left[j], fed, alpha=1 / pivot)
        # no finer than its codes can say
        grain = max(step / pivot, float(wanted.abs().amax()) / TOP)
        x = wanted / grain
        codes[j] = rounded(x, dead_zone(x.abs().mean()))
        squares = codes[j] @ codes[j]
        if squares > 0:
            scales[j] = ((codes[j] @ wanted) * (size[j] / squares)).bfloat16()
        torch.sub(left[j], codes[j] * (scales[j] / size[j]), out=missing[j])


def _left_compiled(
    left: Tensor,
    terms: Tensor,
    inner: Tensor,
    pivots: Tensor,
    size: Tensor,
    step: float,
    out: tuple[Tensor, Tensor, Tensor],
) -> None:
    from cl_graft.skillpack.compress.compiled import left_block

    given = [each.numpy() for each in (left, terms, inner, pivots, size)]
    numbers = [np.float32(number) for number in (step, BIT, TOP)]
    left_block(*given, *numbers, *(each.numpy() for each in out))
