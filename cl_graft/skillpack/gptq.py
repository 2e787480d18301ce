"""GPTQ: quantise a weight matrix so that its outputs, not its entries, change least.

`||X W^T - X What^T||^2 = n trace(D H D^T)` with D = W - What and H = X^T X / n. Columns are rounded
one after another, and the error of each is pushed onto the columns still to come through the upper
Cholesky factor of H^-1 (Frantar et al. 2023, "GPTQ", section 3, after OBS). Then coordinate descent
revisits each entry with all the others fixed (Behdin et al. 2023, "QuantEase"): it can only lower
the error, and at 2 bits takes off a fifth of it.

Inside, a weight is stored as (cols, rows), so that a column is contiguous, and a grid belongs to a
tile, `wide` columns by `tall` rows: (group_size, 1) for groups along the columns, (1, group_size)
for groups down the rows. One solver does both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cl_graft.skillpack.quant import (
    Quantized,
    check,
    fit_grid,
    groups_in,
    nearest_codes,
    normalised,
)

Axis = Literal["cols", "rows"]
Grid = tuple[Tensor, Tensor]  # scale, zero of one tile column: each float32 (rows / tall,)
Fit = Callable[[Tensor, Tensor], Grid]  # (tile columns (wide, rows), importance (wide,)) -> Grid


def gptq(
    weight: Tensor,
    hessian: Tensor,
    bits: int,
    *,
    group_size: int = 64,
    group_axis: Axis = "cols",
    damping: float = 0.01,
    act_order: bool = False,
    symmetric: bool = False,
    search: bool = True,
    block: int = 128,
    polish: int = 2,
) -> Quantized:
    """Quantise `weight` (rows, cols) of a linear layer whose inputs have second moment `hessian`.

    weight: any float dtype; the work is done in float32.
    hessian: (cols, cols), X^T X / n of the layer's inputs, symmetric positive semi-definite, of any
        scale. Where it is 0 (inputs that never fired) what is left is rounding to nearest.
    group_axis: "cols": `group_size` neighbours in a row share a scale; the result is of `weight`.
        "rows": neighbours in a column do, for columns of very different size; a column's scales are
        fitted when its turn comes, error feedback included; the result is of `weight.T`.
    damping: share of the mean diagonal added to the diagonal; where Cholesky still fails in float32
        and float64 it is raised tenfold, as often as it takes.
    act_order: columns by falling diagonal. Groups are by the original order, so the layout does not
        change; with "cols" their grids are then fitted before the first column is rounded.
    symmetric, search: as in `quant.fit_grid`, an entry's importance being its share of the error.
    block: columns between two updates of all the columns left; a matter of speed only.
    polish: sweeps of coordinate descent after the solve; 0 is the published GPTQ.

    Deterministic. Raises ValueError: non-finite or empty input, shapes that do not fit, a Hessian
    that is far from positive semi-definite.
    """
    return gptq_many(
        [weight],
        hessian,
        bits,
        group_size=group_size,
        group_axis=group_axis,
        damping=damping,
        act_order=act_order,
        symmetric=symmetric,
        search=search,
        block=block,
        polish=polish,
    )[0]


def gptq_many(
    weights: list[Tensor],
    hessian: Tensor,
    bits: int,
    *,
    group_size: int = 64,
    group_axis: Axis = "cols",
    damping: float = 0.01,
    act_order: bool = False,
    symmetric: bool = False,
    search: bool = True,
    block: int = 128,
    polish: int = 2,
) -> list[Quantized]:
    """`gptq` of matrices (rows_i, cols) that read the same inputs (q, k, v): one solve for all.

    Rows do not interact, so the results are those of separate calls up to the rounding of float32
    sums. Arguments and errors as in `gptq`.
    """
    _check(weights, hessian, bits, group_size, group_axis, damping, block)
    wide, tall = group_size, 1
    if group_axis == "rows":
        wide, tall = 1, min(group_size, max(len(weight) for weight in weights))

    def fit(tile: Tensor, importance: Tensor) -> Grid:
        vectors = tile.reshape(len(tile), -1, tall).transpose(0, 1).flatten(1)
        weighting = importance.repeat_interleave(tall)
        return fit_grid(vectors, bits, symmetric=symmetric, search=search, importance=weighting)

    scaled = [normalised(weight) for weight in weights]
    columns = torch.cat([_padded(x.T, tall) for x, _ in scaled], 1)
    precision = torch.promote_types(hessian.dtype, torch.float32)
    hessian = hessian.detach().to(columns.device, precision)
    order = torch.arange(len(hessian), device=columns.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
    damped, upper = _factorised(hessian[order][:, order], damping)
    job = _Job(columns[order], damped, upper, (order // wide).tolist(), wide, bits, block)
    solved = _quantise(job, order.argsort(), fit, static=act_order and wide > 1, polish=polish)

    results, start = [], 0
    for weight, (_, exponent) in zip(weights, scaled, strict=True):
        groups = slice(start // tall, start // tall + groups_in(len(weight), tall))
        ranges = slice(start, start + len(weight)), groups, groups
        parts = [part[:, i] for part, i in zip(solved, ranges, strict=True)]
        codes, scale, zero = ((t.T if group_axis == "cols" else t).contiguous() for t in parts)
        results.append(Quantized(codes, scale, zero, bits, group_size, exponent))
        start = groups.stop * tall
    return results


@dataclass(frozen=True)
class _Job:
    """What is to be solved, columns and Hessian in solving order."""

    columns: Tensor  # float32 (cols, rows)
    damped: Tensor  # float32 (cols, cols), the Hessian + damping
    upper: Tensor  # float32 (cols, cols), upper triangular, U^T U the inverse of `damped`
    tiles: list[int]  # the tile each column belongs to
    wide: int  # columns of a tile
    bits: int
    block: int


def _quantise(
    job: _Job, place: Tensor, fit: Fit, *, static: bool, polish: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (cols, rows), scale and zero (tiles, rows / tall) in the types they are stored in and
    in the original order; `place` (cols,) is where each original column comes in solving order."""
    grids: dict[int, Grid] = {}
    if static:  # the turns of a tile's columns come far apart: fit every grid before the first
        share = job.upper.diagonal() ** -2
        for k, members in enumerate(torch.split(place, job.wide)):
            grids[k] = fit(job.columns[members], share[members])
    values = _solve(job, grids, fit)
    for _ in range(polish):
        _sweep(job, grids, values)
    scale, zero = (torch.stack([grids[k][i] for k in range(len(grids))]) for i in (0, 1))
    tile = torch.arange(len(values), device=values.device) // job.wide
    shaped = values[place].view(len(values), scale.shape[1], -1)
    codes = nearest_codes(shaped, scale[tile, :, None], zero[tile, :, None], job.bits)
    return codes.flatten(1).byte(), scale.half(), zero.byte()


def _solve(job: _Job, grids: dict[int, Grid], fit: Fit) -> Tensor:
    """GPTQ: the quantised columns (cols, rows). `grids` is by tile; a tile that has none gets one
    when the turn comes to its first column, fitted to its columns as the feedback left them."""
    left = job.columns.clone()
    values, errors = torch.empty_like(left), torch.empty_like(left)
    # An error in a column, fed back to the columns after it, costs its square times this share.
    share, pivots = job.upper.diagonal() ** -2, job.upper.diagonal().tolist()
    for start in range(0, len(left), job.block):
        stop = min(start + job.block, len(left))
        for j in range(start, stop):
            done = slice(start, j)  # of this block; the blocks before it are fed back already
            if job.tiles[j] not in grids:
                tile = slice(j, j + job.wide)
                fed = left[tile] - job.upper[done, tile].T @ errors[done]
                grids[job.tiles[j]] = fit(fed, share[tile])
            x = left[j] - job.upper[done, j] @ errors[done]
            values[j] = _rounded(x, grids[job.tiles[j]], job.bits)
            errors[j] = (x - values[j]) / pivots[j]
        left[stop:] -= job.upper[start:stop, stop:].T @ errors[start:stop]
    return values


def _sweep(job: _Job, grids: dict[int, Grid], values: Tensor) -> None:
    """Coordinate descent on `values`, in place: each column moves to the grid points nearest to the
    minimum of trace(D H D^T) over that column alone, which is at value + (H D^T)_j / H_jj."""
    diagonal, missing = job.damped.diagonal().tolist(), job.columns - values
    for start in range(0, len(values), job.block):
        span = slice(start, start + job.block)
        slope, before = job.damped[span] @ missing, values[span].clone()
        moved = torch.zeros_like(before)
        for i, j in enumerate(range(start, start + len(before))):
            change = slope[i] - job.damped[j, start:j] @ moved[:i]
            values[j] = _rounded(values[j] + change / diagonal[j], grids[job.tiles[j]], job.bits)
            moved[i] = values[j] - before[i]
        missing[span] -= moved


def _rounded(x: Tensor, grid: Grid, bits: int) -> Tensor:
    """`x` (rows,) on the nearest points of its grids."""
    scale, zero = (part[:, None] for part in grid)
    steps = nearest_codes(x.view(len(scale), -1), scale, zero, bits) - zero
    return (scale * steps).flatten()


def _factorised(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """`(damped, upper)`: the Hessian, mean diagonal 1, plus damping; U with U^T U its inverse.

    With H = R R^T, R upper triangular (the Cholesky factor of H with its order reversed), U is
    R^-1: the inverse itself, in which rounding errors grow squared, is never formed.
    """
    h = hessian / (float(hessian.diagonal().double().abs().mean()) or 1.0)
    eye = torch.eye(len(h), dtype=torch.float32, device=h.device)
    for _ in range(12):
        for dtype in (torch.float32, torch.float64):
            damped, one = h.to(dtype) + damping * eye, eye.to(dtype)
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed:
                upper = torch.linalg.solve_triangular(lower.flip(0, 1), one, upper=True).float()
                if upper.isfinite().all():
                    return damped.float(), upper
        damping = 10 * max(damping, 1e-7)
    raise ValueError("the Hessian is far from positive semi-definite; pass X^T X / n in float32.")


def _padded(columns: Tensor, tall: int) -> Tensor:
    """`columns` (cols, rows) with zeros up to whole tiles; a zero sways no grid."""
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % tall))


def _check(
    weights: list[Tensor],
    hessian: Tensor,
    bits: int,
    group_size: int,
    group_axis: str,
    damping: float,
    block: int,
) -> None:
    """Raise ValueError unless the arguments fit together."""
    if group_axis not in ("cols", "rows"):
        raise ValueError(f"group_axis is {group_axis!r}; choose 'cols' or 'rows'.")
    if not 0 <= damping < math.inf:
        raise ValueError(f"damping is {damping}; pass a share of the diagonal such as 0.01.")
    if block < 1:
        raise ValueError(f"block is {block}; pass 1 or more.")
    if not weights:
        raise ValueError("the list of weights is empty; pass at least one matrix.")
    for weight in weights:
        check(weight, bits, group_size)
        if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
            raise ValueError(
                f"the Hessian has shape {tuple(hessian.shape)} for a weight of shape "
                f"{tuple(weight.shape)}; pass X^T X / n of the inputs of this layer."
            )
    if not hessian.float().isfinite().all():
        raise ValueError("the Hessian holds NaN or infinity; leave out the batch that caused it.")
