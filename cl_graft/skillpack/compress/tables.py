"""Tables as whole numbers at the one step of rate.py: what their rows share by low rank, the rest row by row.

An optimiser like AdamW moves all rows of an embedding, those too whose tokens were never read, along a few directions
(weight decay, momentum, and under a tied head the gradient of every logit). Entry by entry none of that is worth its
bytes; together it is a vector that is added to whatever is read. Vectors, which have no rows, are coded at a fixed
fineness.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import (
    CodeLayout,
    Encoded,
    Meta,
    Spec,
    coded,
    coded_table,
    dense,
    dense_spec,
)
from cl_graft.skillpack.codecs.coded_low_rank import SHIFTED
from cl_graft.skillpack.codecs.entropy import TOP
from cl_graft.skillpack.compress.factorise import leading
from cl_graft.skillpack.compress.rate import (
    BIT,
    RANK_BYTES,
    Rate,
    bits_of,
    dead_zone,
    rate_of,
    rounded,
)

ROW_BYTES = 2.0  # of a row of its own codes, beside them
PRICE = 2 * BIT  # squared steps that a bit is worth
STRIP = 1 << 22  # entries that are worked on at a time
FINENESS = 24  # of norms and biases, whose share of the loss was below what could be measured


@dataclass(frozen=True)
class Table:
    """A tensor that is coded by its rows.

    delta: float32 (rows, n). rows, columns: int64 (rows,) and (n,), the octaves by which an entry's unit is finer than
    `1 / unit`; a squared unit of an entry costs one in squared loss.
    """

    delta: Tensor
    rows: Tensor
    columns: Tensor
    unit: float

    def strips(self) -> Iterator[tuple[slice, Tensor]]:
        """Rows by rows, the entries in the square root of the loss, float32."""
        columns = torch.exp2(self.columns.float()) * self.unit
        size = max(1, STRIP // max(1, len(columns)))
        for start in range(0, len(self.delta), size):
            part = slice(start, start + size)
            yield part, self.delta[part] * torch.exp2(self.rows[part].float())[:, None] * columns


def table_of(delta: Tensor, rows: Tensor, columns: Tensor) -> Table:
    """A table whose entries cost about `rows * columns` of a squared unit each, float32 (rows,) and (n,).

    Units are whole octaves apart, which a file says in next to nothing, and is right to within half an octave.
    """
    octaves, unit = [], 1.0
    for weights in (rows, columns):
        size = weights.double().sqrt()
        usual = max(float(size.median()), float(size.amax()) * 2.0**-SHIFTED, 1e-30)
        octaves.append((size / usual).clamp_min(1e-30).log2().round().clamp_(-SHIFTED, SHIFTED))
        unit *= usual
    return Table(delta, octaves[0].long(), octaves[1].long(), unit)


def table_directions(table: Table, most: int) -> Tensor:
    """The directions in which rows of a table lie, those of most energy first: float32 (most, n), orthonormal."""
    n = table.delta.shape[1]
    gram = torch.zeros(n, n, device=table.delta.device)
    for _, x in table.strips():
        gram.addmm_(x.T, x)
    return leading(gram, most)[1].T.contiguous()


def table_rate(table: Table, basis: Tensor, layout: CodeLayout) -> Rate:
    """The rate of a table. basis: its directions, (ranks, n)."""
    rows, n = table.delta.shape
    along = torch.cat([x @ basis.T for _, x in table.strips()])
    size = torch.cat([x.abs().mean(1) for _, x in table.strips()]).double()
    whole = torch.cat([x.square().sum(1) for _, x in table.strips()]).double()
    energy, magnitude = along.square().sum(0).double(), along.abs().mean(0).double()
    flat = size / whole.sqrt().clamp_min(1e-300)  # of a row, whatever is left of it

    def cost(step: float) -> float:
        ranks = _worth(energy / step**2, magnitude / step, (rows, n), layout)
        bits, left = 8 * RANK_BYTES * int(ranks.sum()), whole
        if ranks.any():
            bits += float(
                _rank_bits(energy / step**2, magnitude / step, (rows, n), layout)[ranks].sum()
            )
            left = (whole - along[:, ranks].square().sum(1).double()).clamp_min(0)
        own = n * bits_of(flat * left.sqrt() / step, layout) + 8 * ROW_BYTES
        return (bits + float(own[left / step**2 > PRICE * own].sum())) / 8

    coarsest = (
        max(float(energy.amax().sqrt()), float(size.amax()) * (2.0 * n) ** 0.5) if rows * n else 0
    )
    return rate_of(cost, coarsest, float(size.amax()) if rows * n else 0.0)


def _rank_bits(
    energy: Tensor, magnitude: Tensor, shape: tuple[int, int], layout: CodeLayout
) -> Tensor:
    """Bits of each direction of a table; energy, magnitude: of what lies along it, in steps: float64 (ranks,)."""
    rows, n = shape
    right = bits_of(0.8 * (energy / n).sqrt(), layout)
    return rows * bits_of(magnitude, layout) + n * right + 8 * RANK_BYTES


def _worth(energy: Tensor, magnitude: Tensor, shape: tuple[int, int], layout: CodeLayout) -> Tensor:
    """Which directions of a table are worth their bytes: bool (ranks,)."""
    return energy > PRICE * _rank_bits(energy, magnitude, shape, layout)


def encode_table(
    table: Table, basis: Tensor, shape: tuple[int, ...], step: float, layout: CodeLayout
) -> Encoded:
    """A table at one step; directions and rows that are not worth their bytes are left out.

    basis: its directions, (ranks, n); of a tensor other than a matrix none are used. shape: of the tensor.
    """
    step = float(torch.tensor(step / table.unit).bfloat16()) * table.unit
    right, scales, kept = _directions(table, basis if len(shape) == 2 else basis[:0], step, layout)
    along = (right.float() * scales[:, None]).double()
    solve = torch.linalg.pinv(along).float() if len(along) else along.T.float()
    lefts, finer, places, codes = [], [], [], []
    for part, x in table.strips():
        x = x / step
        left = x @ solve
        # no finer than its codes can say
        top = torch.cat([x, left], 1).abs().amax(1) / TOP
        coarser = torch.exp2(top.clamp_min(1.0).log2().ceil())[:, None]
        x, left = x / coarser, left / coarser
        finer.append(table.rows[part] - coarser[:, 0].log2().long())
        left = rounded(left, dead_zone(kept)) if len(along) else left
        lefts.append(left.to(torch.int16))
        x -= left @ along.float()
        magnitude = x.abs().mean(1)
        code = rounded(x, dead_zone(magnitude)[:, None])
        gain = (x.square() - (x - code).square()).sum(1)
        bits = x.shape[1] * bits_of(magnitude, layout) + 8 * ROW_BYTES
        mine = (gain > PRICE * bits).nonzero().reshape(-1)
        places.append(mine + part.start)
        codes.append(code[mine].to(torch.int16))
    left, rows, alive, own = (torch.cat(each).cpu() for each in (lefts, finer, places, codes))
    size = step / table.unit
    if len(shape) != 2:
        whole = torch.zeros(len(rows), own.shape[1], dtype=torch.int16)
        whole[alive] = own
        columns = torch.exp2(-table.columns.cpu().float())
        return coded(whole, size * torch.exp2(-rows.float()), shape, layout, columns)
    some = left.any(0)
    scales = torch.cat([size * scales.cpu()[some], torch.tensor([size])])
    shifts = rows.to(torch.int16), table.columns.to(torch.int16).cpu()
    factors = left.T[some].contiguous(), right.to(torch.int16).cpu()[some]
    return coded_table(*factors, scales, shifts, (alive, own), layout)


def _directions(
    table: Table, basis: Tensor, step: float, layout: CodeLayout
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes of the directions that are worth their bytes, as floats (ranks, n); their scales in steps, (ranks,), so
    that they are bfloat16 in the file; the mean magnitude of what lies along each, in steps."""
    rows, n = table.delta.shape
    along = torch.zeros(2, len(basis), dtype=torch.float64, device=basis.device)
    if len(basis):
        for _, x in table.strips():
            mine = (x @ basis.T) / step
            along += torch.stack([mine.square().sum(0), mine.abs().sum(0)]).double()
    energy, magnitude = along[0], along[1] / max(1, rows)
    worth = _worth(energy, magnitude, (rows, n), layout)
    basis, energy, magnitude = basis[worth], energy[worth], magnitude[worth]
    # a unit of a direction's entry costs the energy along it; no finer than its codes can say
    fineness = (
        energy.sqrt().float().minimum(TOP / basis.abs().amax(1)) if len(basis) else basis[:, 0]
    )
    codes = (basis * fineness[:, None]).round_().clamp_(-TOP, TOP)
    unit = step / table.unit
    scales = (unit / fineness).bfloat16().float() / unit
    some = codes.any(1)
    return codes[some], scales[some], magnitude[some].float()


def vector_ways(delta: Tensor, layout: CodeLayout) -> tuple[Encoded, Encoded]:
    """A tensor, each row to 1 / FINENESS of its root mean square, and in bfloat16, which a header says less of."""
    rows = delta.float().cpu().reshape(len(delta) if delta.ndim > 1 else 1, -1)
    steps = (rows.square().mean(1).sqrt() / FINENESS).maximum(rows.abs().amax(1) / TOP)
    steps = steps.bfloat16().float().clamp_min(1e-38)
    codes = (rows / steps[:, None]).round_().clamp_(-TOP, TOP).to(torch.int16)
    return coded(codes, steps, tuple(delta.shape), layout), dense(delta)


def vector_specs(shape: tuple[int, ...], layout: CodeLayout) -> tuple[Spec, Spec]:
    """About what `vector_ways` says of a vector, before there is one: a code takes some six bits."""
    size = 4 * -(-prod(shape) * (8 if layout == "fast" else 6) // 32)
    lies: Meta = {"layout": layout, "bytes": size} | ({"top": 99} if layout == "small" else {})
    return ("coded", shape, {"kept": 1, "columns": 0, **lies}), dense_spec(shape)
