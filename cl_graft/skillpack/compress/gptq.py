"""GPTQ: quantise a weight matrix so that its outputs, not its entries, change least.

`||X W^T - X What^T||^2 = n trace(D H D^T)` with D = W - What and H = X^T X / n. Columns are rounded
one after another, and the error of each is pushed onto the columns still to come (Frantar et al. 2023,
"GPTQ", section 3, after OBS). The same steps are taken here without the inverse of H: with H = R R^T,
R upper triangular, the error is the sum over j of |sum_{i <= j} D_i R_ij|^2, so that column j is best
where it cancels what the columns before it have left in its term (Babai's nearest plane; Chen et al.
2025, arXiv 2507.18553, show that the two are one). Then coordinate descent revisits each entry with
all the others fixed (Behdin et al. 2023, "QuantEase"): it can only lower the error.

Inside, a weight is stored as (cols, rows), so that a column is contiguous, and a grid belongs to a
tile, `wide` columns by `tall` rows: (group_size, 1) for groups along the columns, (1, group_size)
for groups down the rows. One solver does both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cl_graft.skillpack.codecs.quant import Quantized, check, fit_grid, groups_in, normalised

Axis = Literal["cols", "rows"]
Grid = tuple[Tensor, Tensor]  # scale, zero of one tile column: each float32 (rows / tall,)
Fit = Callable[[int, Tensor, Tensor], Grid]  # (tile, its columns (wide, rows), importance (wide,))
Top = float | Tensor  # the largest code: of a whole column, or of each of its groups (rows / tall,)


def gptq_many(
    weights: list[Tensor],
    hessian: Tensor,
    bits: int | list[int],
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
    """Quantise matrices (rows_i, cols) of linear layers that read the same inputs (q, k, v): one solve for all.

    Rows do not interact, so the results are those of separate calls up to the rounding of float32 sums.

    weights: any float dtype; the work is done in float32.
    hessian: (cols, cols), X^T X / n of the layers' inputs, symmetric positive semi-definite, of any
        scale. Where it is 0 (inputs that never fired) what is left is rounding to nearest.
    bits: of all, or one number for each matrix.
    group_axis: "cols": `group_size` neighbours in a row share a scale; the results are of the weights.
        "rows": neighbours in a column do, for columns of very different size; a column's scales are
        fitted when its turn comes, error feedback included; the results are of the weights' transposes.
    damping: share of the mean diagonal added to the diagonal; where Cholesky still fails in float32
        and float64 it is raised tenfold, as often as it takes.
    act_order: columns by falling diagonal. Groups are by the original order, so the layout does not
        change; with "cols" their grids are then fitted before the first column is rounded.
    symmetric, search: as in `quant.fit_grid`, an entry's importance being its share of the error.
    block: columns between two updates of all the columns left; a matter of speed only.
    polish: sweeps of coordinate descent after the solve; 0 is the published GPTQ (arXiv 2210.17323).

    Deterministic. Raises ValueError: non-finite or empty input, shapes that do not fit, a Hessian
    that is far from positive semi-definite.
    """
    each = [bits] * len(weights) if isinstance(bits, int) else list(bits)
    _check(weights, hessian, each, group_size, group_axis, damping, block)
    wide, tall = group_size, 1
    if group_axis == "rows":
        wide, tall = 1, min(group_size, max(len(weight) for weight in weights))
    scaled = [normalised(weight) for weight in weights]
    groups = [groups_in(len(weight), tall) for weight in weights]
    tops = torch.tensor([2.0**b - 1 for b in each]).repeat_interleave(torch.tensor(groups))
    options: dict[str, Any] = {"symmetric": symmetric, "search": search}

    def fit(tile: int, columns: Tensor, importance: Tensor) -> Grid:
        vectors = columns.reshape(len(columns), -1, tall).transpose(0, 1).flatten(1)
        weighting, parts = importance.repeat_interleave(tall), _runs(each, groups)
        grids = [fit_grid(vectors[i], b, importance=weighting, **options) for b, i in parts]
        return torch.cat([g[0] for g in grids]), torch.cat([g[1] for g in grids])

    columns = torch.cat([_padded(x.T, tall) for x, _ in scaled], 1)
    one = each[0] if len(set(each)) == 1 else 0
    top: Top = 2.0**one - 1 if one else tops.to(columns.device)
    job = _job(columns, hessian, damping, act_order, wide, [top] * columns.shape[0], block)
    grids: dict[int, Grid] = {}
    if act_order and wide > 1:  # the turns of a tile's columns come far apart: fit every grid first
        share, place = job.root.diagonal() ** 2, job.order.argsort()
        for k, members in enumerate(torch.split(place, wide)):
            grids[k] = fit(k, job.columns[members], share[members])
    codes, scale, zero = _quantise(job, grids, fit, polish)
    results, start = [], 0
    for weight, (_, exponent), b in zip(weights, scaled, each, strict=True):
        span = slice(start // tall, start // tall + groups_in(len(weight), tall))
        mine = codes[:, start : start + len(weight)], scale[:, span], zero[:, span]
        parts = [(t.T if group_axis == "cols" else t).contiguous() for t in mine]
        results.append(Quantized(parts[0], parts[1], parts[2], b, group_size, exponent))
        start = span.stop * tall
    return results


def gptq_runs(
    weight: Tensor,
    hessian: Tensor,
    runs: Mapping[int, int],
    *,
    group_size: int = 64,
    damping: float = 0.01,
    symmetric: bool = False,
    search: bool = True,
    block: int = 128,
    polish: int = 2,
) -> list[Quantized]:
    """One matrix (rows, cols) whose columns change precision: `runs` is {bits: columns}, in order.

    Groups lie down the rows. The error of a column is fed back to all the columns after it, of
    whatever precision. Returns, for each run, the result of its columns, transposed as `gptq_many`
    with group_axis "rows" does. Arguments and errors are those of `gptq_many`.
    """
    _check([weight], hessian, list(runs), group_size, "rows", damping, block)
    tall = min(group_size, len(weight))
    scaled = [normalised(part) for part in weight.split(list(runs.values()), 1)]
    powers = [torch.full((x.shape[1],), 2.0**exponent) for x, exponent in scaled]
    unit = torch.cat(powers).to(weight.device)  # exact: powers of two
    columns = _padded(torch.cat([x for x, _ in scaled], 1).T, tall)
    options: dict[str, Any] = {"symmetric": symmetric, "search": search}
    grids: list[Grid] = []  # of all columns before the first is rounded: feedback moves them little
    for b, part in zip(runs, columns.split(list(runs.values())), strict=True):
        scales, zeros = fit_grid(part.reshape(-1, tall), b, **options)
        grids += zip(scales.view(len(part), -1), zeros.view(len(part), -1), strict=True)
    tops: list[Top] = [2.0**b - 1 for b, count in runs.items() for _ in range(count)]
    job = _job(columns, unit[:, None] * hessian * unit, damping, False, 1, tops, block)
    codes, scale, zero = _quantise(job, dict(enumerate(grids)), None, polish)
    results, start = [], 0
    for (_, exponent), (b, count) in zip(scaled, runs.items(), strict=True):
        run = slice(start, start + count)
        parts = codes[run, : len(weight)].contiguous(), scale[run], zero[run]
        results.append(Quantized(*parts, b, group_size, exponent))
        start = run.stop
    return results


def _runs(bits: list[int], sizes: list[int]) -> list[tuple[int, slice]]:
    """(bits, where) of neighbouring matrices of equal bits, so that they are fitted together."""
    runs: list[tuple[int, slice]] = []
    for b, size in zip(bits, sizes, strict=True):
        start = runs[-1][1].stop if runs else 0
        if runs and runs[-1][0] == b:
            runs[-1] = b, slice(runs[-1][1].start, start + size)
        else:
            runs.append((b, slice(start, start + size)))
    return runs


@dataclass(frozen=True)
class _Job:
    """What is to be solved, columns and Hessian in solving order."""

    columns: Tensor  # float32 (cols, rows)
    damped: Tensor  # float32 (cols, cols), the Hessian + damping
    root: Tensor  # float32 (cols, cols), upper triangular, R R^T = damped
    order: Tensor  # int64 (cols,), the original column of each
    tiles: list[int]  # the tile each column belongs to
    tops: list[Top]  # of each column
    wide: int  # columns of a tile
    block: int


def _job(
    columns: Tensor,
    hessian: Tensor,
    damping: float,
    act_order: bool,
    wide: int,
    tops: list[Top],
    block: int,
) -> _Job:
    precision = torch.promote_types(hessian.dtype, torch.float32)
    hessian = hessian.detach().to(columns.device, precision)
    order = torch.arange(len(hessian), device=columns.device)
    if act_order:
        order = hessian.diagonal().argsort(descending=True, stable=True)
        columns, hessian = columns[order], hessian[order][:, order]
    damped, root = factorised(hessian, damping)
    return _Job(columns, damped, root, order, (order // wide).tolist(), tops, wide, block)


def _quantise(
    job: _Job, grids: dict[int, Grid], fit: Fit | None, polish: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (cols, rows), scale and zero (tiles, rows / tall) in the types they are stored in and
    in the original order. grids: by tile; those that are missing are made by `fit`."""
    values = _solve(job, grids, fit)
    for _ in range(polish):
        _sweep(job, grids, values)
    scale, zero = (torch.stack([grids[k][i] for k in range(len(grids))]) for i in (0, 1))
    codes = torch.empty_like(values, dtype=torch.uint8)
    for start in range(0, len(values), job.block):
        tile = torch.tensor(job.tiles[start : start + job.block], device=values.device)
        part = values[start : start + job.block].view(len(tile), scale.shape[1], -1)
        steps = (part / scale[tile, :, None]).add_(zero[tile, :, None])  # on the grid already
        codes[start : start + job.block] = steps.round_().flatten(1).byte()
    return codes[job.order.argsort()], scale.half(), zero.byte()


def _solve(job: _Job, grids: dict[int, Grid], fit: Fit | None) -> Tensor:
    """GPTQ: the quantised columns (cols, rows). A tile that has no grid yet gets one when the turn
    comes to its first column, fitted to its columns as the feedback left them."""
    columns, root = job.columns, job.root
    values, missing = torch.empty_like(columns), torch.empty_like(columns)
    share, pivots = root.diagonal() ** 2, root.diagonal().tolist()
    terms = torch.zeros_like(columns)  # what the columns of earlier blocks left in each one's term
    for start in range(0, len(columns), job.block):
        stop = min(start + job.block, len(columns))
        inner, mine = root[start:stop, start:stop].T.contiguous(), missing[start:stop]
        for i, j in enumerate(range(start, stop)):
            tile, left = job.tiles[j], terms[j]
            if fit is not None and tile not in grids:
                span = slice(j, j + job.wide)
                pushed = terms[span] + root[start:j, span].T @ mine[:i]
                lower = root[span, span].T
                fed = columns[span] + torch.linalg.solve_triangular(lower, pushed, upper=False)
                grids[tile] = fit(tile, fed, share[span])
            if i:  # columns of this block
                left = torch.addmv(left, mine[:i].T, inner[i, :i])
            best = torch.add(columns[j], left, alpha=1 / pivots[j])
            values[j] = _rounded(best, grids[tile], job.tops[j])
            torch.sub(columns[j], values[j], out=missing[j])
        terms[stop:].addmm_(root[start:stop, stop:].T, mine)
    return values


def _sweep(job: _Job, grids: dict[int, Grid], values: Tensor) -> None:
    """Coordinate descent on `values`, in place: each column moves to the grid points nearest to the
    minimum of trace(D H D^T) over that column alone, which is at value + (H D^T)_j / H_jj."""
    diagonal, missing = job.damped.diagonal().tolist(), job.columns - values
    for start in range(0, len(values), job.block):
        stop = min(start + job.block, len(values))
        slope, moved = job.damped[start:stop] @ missing, torch.zeros_like(values[start:stop])
        inner = job.damped[start:stop, start:stop].contiguous()
        for i, j in enumerate(range(start, stop)):
            change = torch.addmv(slope[i], moved[:i].T, inner[i, :i], alpha=-1) if i else slope[0]
            target = torch.add(values[j], change, alpha=1 / diagonal[j])
            new = _rounded(target, grids[job.tiles[j]], job.tops[j])
            torch.sub(new, values[j], out=moved[i])
            values[j] = new
        missing[start:stop] -= moved


def _steps(x: Tensor, grid: Grid, top: Top) -> Tensor:
    """Codes, as floats (groups, tall), of the grid points nearest to `x` (rows,)."""
    scale, zero = grid
    if len(scale) != len(x):
        x, scale, zero = x.view(len(scale), -1), scale[:, None], zero[:, None]
        top = top[:, None] if isinstance(top, Tensor) else top
    steps = torch.div(x, scale).add_(zero).round_()
    return steps.clamp_(0, top) if not isinstance(top, Tensor) else steps.clamp_(min=0).minimum(top)


def _rounded(x: Tensor, grid: Grid, top: Top) -> Tensor:
    """`x` (rows,) on the nearest points of its grids."""
    scale, zero = grid
    steps = _steps(x, grid, top)
    if len(scale) != len(x):
        scale, zero = scale[:, None], zero[:, None]
    return steps.sub_(zero).mul_(scale).flatten()


def factorised(hessian: Tensor, damping: float, scaled: bool = True) -> tuple[Tensor, Tensor]:
    """`(damped, root)`: the Hessian plus damping; R upper triangular, R R^T = damped. Both float32.

    R is the Cholesky factor of the Hessian with its order reversed, reversed. damping: a share of the mean diagonal.
    scaled: brought to a mean diagonal of 1. Raises ValueError for a matrix that is far from positive semi-definite.
    """
    scale = float(hessian.diagonal().double().abs().mean()) or 1.0
    size = 1.0 if scaled else scale
    for _ in range(12):
        for dtype in (torch.float32, torch.float64):
            damped = hessian.to(dtype, copy=True).div_(scale)
            damped.diagonal().add_(damping)
            lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
            if not failed and lower.diagonal().isfinite().all():
                return damped.mul_(size).float(), lower.flip(0, 1).mul_(size**0.5).float()
        damping = 10 * max(damping, 1e-7)
    raise ValueError("the Hessian is far from positive semi-definite; pass X^T X / n in float32.")


def _padded(columns: Tensor, tall: int) -> Tensor:
    """`columns` (cols, rows) with zeros up to whole tiles; a zero sways no grid."""
    return torch.nn.functional.pad(columns, (0, -columns.shape[1] % tall))


def _check(
    weights: list[Tensor],
    hessian: Tensor,
    bits: list[int],
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
    for weight, b in zip(weights * (len(bits) if len(weights) == 1 else 1), bits, strict=True):
        check(weight, b, group_size)
        if tuple(hessian.shape) != (weight.shape[1], weight.shape[1]):
            raise ValueError(
                f"the Hessian has shape {tuple(hessian.shape)} for a weight of shape "
                f"{tuple(weight.shape)}; pass X^T X / n of the inputs of this layer."
            )
    if not hessian.float().isfinite().all():
        raise ValueError("the Hessian holds NaN or infinity; leave out the batch that caused it.")
