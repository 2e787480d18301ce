"""What every matrix and table of a model would take at each step, before any of them is encoded."""

from __future__ import annotations

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import CodeLayout
from cl_graft.skillpack.compress.directions import wanted_directions
from cl_graft.skillpack.compress.factorise import Spectrum
from cl_graft.skillpack.compress.gptq import factorised
from cl_graft.skillpack.compress.rate import Rate, Weighted, column_shifts, matrix_rate
from cl_graft.skillpack.compress.tables import Table, table_directions, table_of, table_rate
from cl_graft.skillpack.compress.work import Piece, Work, alike, importance, measure, slope_of
from cl_graft.skillpack.compress.work_store import Item


def rates_of(work: Work, layout: CodeLayout) -> dict[str, Rate]:
    """What every matrix and table takes at each step, where it takes anything."""
    # matrices that read one input come one after the other
    last: tuple[Tensor | None, float] = None, 1.0

    def use(piece: Piece, found: Spectrum, delta: Tensor, under: Tensor | None) -> None:
        slope = slope_of(work.moments, piece)
        if slope is None:
            slope = alike(found.energy) if work.moments.reads else torch.ones(())
        nonlocal last
        if under is not last[0]:
            unit = 1.0 if under is None else column_shifts(factorised(under, 0.0, False)[1])[1]
            last = under, unit
        rate = matrix_rate(Weighted(delta, found, float(slope)), under, last[1], layout)
        about = {"largest": rate.largest, "slope": float(slope)}
        work.store[f"rate/{piece.name}"] = Item({"bytes": rate.bytes}, about)

    measure(work, lambda name: f"rate/{name}" in work.store, use)
    shapes = {p.name: p.shape for p in work.pieces if p.kind != "vector" and len(p.shape) == 2}
    wanted = wanted_directions(shapes, work.policy, work.limit.bytes)
    rates = {}
    for piece in work.pieces:
        key = f"rate/{piece.name}"
        if piece.kind == "table" and key not in work.store:
            table = weighed(work, piece)
            basis = table_directions(table, wanted.get(piece.name, 0))
            rate = table_rate(table, basis, layout)
            about = {"largest": rate.largest}
            work.store[key] = Item({"bytes": rate.bytes, "basis": basis.cpu()}, about)
        if piece.kind != "vector":
            tensors, about = work.store[key]
            rates[piece.name] = Rate(tensors["bytes"], about["largest"])
    return {name: rate for name, rate in rates.items() if rate.largest > 0}


def weighed(work: Work, piece: Piece) -> Table:
    """A table with the weights of its entries as a product of rows' and columns'."""
    whole = piece.delta().to(work.device, torch.float32)
    delta = whole.reshape(len(whole), -1) if whole.ndim > 1 else whole[None]
    weigh = importance(piece, whole, work.moments)
    rows = torch.empty(len(delta), device=delta.device)
    columns = torch.zeros(delta.shape[1], device=delta.device)
    for start in range(0, len(delta), step := max(1, (1 << 22) // delta.shape[1])):
        part = slice(start, start + step)
        weights = weigh(part)
        weights = weights.expand(delta[part].shape)
        rows[part] = weights.mean(1)
        columns += weights.sum(0)
    # a text says as little of its rarer rows as of rarer inputs of a matrix: those of a head that never are the answer
    # move together, and what all others are worth with them
    share = work.policy.damping
    columns = columns / columns.mean().clamp_min(1e-30) + share
    return table_of(delta, rows + share * rows.mean(), columns)
