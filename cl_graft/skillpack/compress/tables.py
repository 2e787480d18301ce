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
    coded_rows,
    coded_table,
    dense,
    dense_spec,
)
from cl_graft.skillpack.codecs.coded_low_rank import SHIFTED
from cl_graft.skillpack.codecs.entropy import TOP
from cl_graft.skillpack.compress.factorise import leading
from cl_graft.skillpack.compress.rate import RANK_BYTES, Rate, bits_of, rate_of
from cl_graft.skillpack.compress.solve import BIT, dead_zone, rounded

ROW_BYTES = 2.0  # of a row of its own codes, beside them
OUTLIER = 8.0  # times the usual energy, from which a row has no say in the directions of all
PRICE = 2 * BIT  # squared steps that a bit is worth
SAMPLE = 4096  # rows that what a table takes is estimated by
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
    """The directions in which rows of a table lie, those of most energy first: float32 (most, n), orthonormal.

    Rows of far more energy than others, as of tokens that are often read, lie wherever they do, and have no say.
    """
    n = table.delta.shape[1]
    if not most:
        return table.delta.new_zeros(0, n)
    usual = ~_outliers(_energies(table))
    if len(usual) < n:  # by the smaller Gram matrix
        x = torch.cat([x for _, x in table.strips()])[usual]
        along = leading(x @ x.T, most)[1].T @ x
        return along / along.norm(dim=1, keepdim=True).clamp_min(1e-30)
    gram = table.delta.new_zeros(n, n)
    for part, x in table.strips():
        mine = x[usual[part]]
        gram.addmm_(mine.T, mine)
    return leading(gram, most)[1].T.contiguous()


def _energies(table: Table) -> Tensor:
    """float64 (rows,): the squared norm of each row."""
    return torch.cat([x.square().sum(1) for _, x in table.strips()]).double()


def _outliers(energies: Tensor) -> Tensor:
    some = energies[energies > 0]
    return energies > OUTLIER * some.median() if len(some) else energies > 0


@dataclass(frozen=True)
class Shares:
    """What can be told of the rows of a table before they are coded, whatever the step.

    along: float32 (rows, ranks), their parts along the table's directions; energies: float64 (rows,); flat: mean
    magnitude of a row's entries over the root of its energy, float64 (rows,); outliers: bool (rows,); each: how many
    rows each stands for, float64 (rows,).
    """

    along: Tensor
    energies: Tensor
    flat: Tensor
    outliers: Tensor
    each: Tensor
    n: int

    @classmethod
    def of(cls, table: Table, basis: Tensor) -> Shares:
        along = torch.cat([x @ basis.T for _, x in table.strips()])
        size = torch.cat([x.abs().mean(1) for _, x in table.strips()]).double()
        energies = _energies(table)
        flat = size / energies.sqrt().clamp_min(1e-300)
        each = torch.ones_like(energies)
        return cls(along, energies, flat, _outliers(energies), each, table.delta.shape[1])

    def sample(self, most: int = SAMPLE) -> Shares:
        """Take at most so many of the outliers and of the other rows, evenly, each for as many as it stands for."""
        picked, each = [], []
        for kind in (self.outliers, ~self.outliers):
            rows = kind.nonzero().reshape(-1)
            mine = rows[:: max(1, -(-len(rows) // most))]
            picked.append(mine)
            each.append(torch.full_like(self.energies[mine], len(rows) / max(1, len(mine))))
        rows = torch.cat(picked)
        parts = self.along[rows], self.energies[rows], self.flat[rows], self.outliers[rows]
        return Shares(*parts, torch.cat(each), self.n)

    def at(self, step: float, layout: CodeLayout) -> tuple[Tensor, Tensor, float]:
        """(directions that are worth their bytes, rows that are better told by codes of their own alone, about the
        bytes of all): bool (ranks,) and (rows,)."""
        along, energies = (self.along / step).abs_(), self.energies / step**2
        squares, usual = along.square(), torch.where(self.outliers, 0.0, self.each)
        magnitude = (usual.float() @ along).double() / usual.sum().clamp_min(1.0)
        energy = (usual.float() @ squares).double()
        right = self.n * bits_of(0.8 * (energy / self.n).sqrt(), layout)
        wanted = self.each.sum() * bits_of(magnitude, layout) + right + 8 * RANK_BYTES
        ranks = energy > PRICE * wanted
        along, squares, magnitude = along[:, ranks], squares[:, ranks], magnitude[ranks]
        # a code of the geometric distribution of its direction
        first, more = _code_bits(magnitude)
        shared = float(first.sum()) + (along @ more.float()).double()
        left = (energies - squares.sum(1).double()).clamp_min(0)
        residual = self._own(left, layout)
        better = left > PRICE * residual + _lost(left, self.n)
        low = squares.clamp_max(1 / 12).sum(1).double() + PRICE * shared
        low += torch.where(better, _lost(left, self.n) + PRICE * residual, left)
        own = self._own(energies, layout)
        alone = _lost(energies, self.n) + PRICE * own < low
        alone &= energies > PRICE * own
        # directions that rows which stand alone were the worth of are none
        paid = ((self.each * ~alone).float() @ squares).double() > PRICE * wanted[ranks]
        shared = float(first[paid].sum()) + (along[:, paid] @ more[paid].float()).double()
        ranks[ranks.clone()] = paid
        bits = torch.where(alone, own, shared + torch.where(better, residual, 0.0))
        rows = float(self.each @ bits) + float((right[ranks] + 8 * RANK_BYTES).sum())
        return ranks, alone, rows / 8

    def _own(self, energies: Tensor, layout: CodeLayout) -> Tensor:
        """Bits of rows that are coded entry by entry, float64 (rows,)."""
        return self.n * bits_of(self.flat * energies.sqrt(), layout) + 8 * ROW_BYTES


def _lost(energy: Tensor, n: int) -> Tensor:
    """About what is lost of n entries of this energy, in squared steps."""
    return energy.clamp_max(n / 12)


def _code_bits(magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Bits of a code 0, and for each unit more, where codes are geometric with this mean magnitude; float64."""
    m = magnitude.clamp_min(1e-4)
    q = ((1 + m * m).sqrt() - 1) / m
    return -((1 - q) / (1 + q)).log2(), -q.log2()


def table_rate(table: Table, basis: Tensor, layout: CodeLayout) -> Rate:
    """The rate of a table. basis: its directions, (ranks, n)."""
    if not table.delta.numel():
        return rate_of(torch.zeros_like, 0.0, 0.0)
    shares = Shares.of(table, basis)
    few = shares.sample()
    size = float((shares.flat * shares.energies.sqrt()).amax())
    together = shares.along.square().sum(0).sum().double()
    coarsest = max(float(together.sqrt()), float(shares.energies.amax().sqrt()))

    def cost(steps: Tensor) -> Tensor:
        return steps.new_tensor([few.at(step, layout)[2] for step in steps.tolist()])

    return rate_of(cost, coarsest, size)


def encode_table(
    table: Table, basis: Tensor, shape: tuple[int, ...], step: float, layout: CodeLayout
) -> Encoded:
    """A table at one step; directions and rows that are not worth their bytes are left out.

    basis: its directions, (ranks, n); of a tensor other than a matrix none are used. shape: of the tensor.
    """
    basis = basis if len(shape) == 2 else basis[:0]
    shares = Shares.of(table, basis)
    step = max(step, float(shares.energies.max().sqrt()) * 2.0**-23)  # the spacing of float32
    unit = float(torch.tensor(step / table.unit).bfloat16())
    step = unit * table.unit
    ranks, alone, _ = shares.at(step, layout)
    right, scales = _right(basis[ranks], shares.along[~alone][:, ranks] / step, unit)
    left, coarser = _left(table, right * scales[:, None], alone, step)
    worth = _paid(left, shares.along[:, ranks] / (step * coarser[:, None]), coarser, layout)
    left, right, scales = left[:, worth], right[worth], scales[worth]
    places, codes = [], []
    for part, x in table.strips():
        x = x / (step * coarser[part, None]) - left[part].float() @ (right * scales[:, None])
        magnitude = x.abs().mean(1)
        code = rounded(x, dead_zone(magnitude)[:, None])
        gain = (x.square() - (x - code).square()).sum(1)
        bits = x.shape[1] * bits_of(magnitude, layout) + 8 * ROW_BYTES
        mine = (gain > PRICE * bits).nonzero().reshape(-1)
        places.append(mine + part.start)
        codes.append(code[mine].to(torch.int16))
    alive, own = torch.cat(places).cpu(), torch.cat(codes).cpu()
    shifts = table.rows.cpu() - coarser.log2().long().cpu()
    if len(shape) != 2:
        whole = torch.zeros(len(shifts), own.shape[1], dtype=torch.int16)
        whole[alive] = own
        columns = torch.exp2(-table.columns.cpu().float()) if table.columns.any() else None
        return coded(whole, unit * torch.exp2(-shifts.float()), shape, layout, columns)
    factors = left.T.contiguous().cpu(), right.to(torch.int16).cpu()
    sizes = torch.cat([unit * scales.cpu(), torch.tensor([unit])])
    octaves = shifts.to(torch.int16), table.columns.to(torch.int16).cpu()
    return coded_table(*factors, sizes, octaves, (alive, own), layout)


def _right(basis: Tensor, along: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Codes of directions, as floats (ranks, n), and their scales in steps, (ranks,), that are bfloat16 in the file.

    along: what lies along each, in steps, (rows, ranks): a unit of a direction's entry costs the energy of that.
    """
    if not len(basis):
        return basis, basis.new_zeros(0)
    # no finer than codes can say
    fineness = along.square().sum(0).sqrt().minimum(TOP / basis.abs().amax(1)).clamp_min(1e-3)
    codes = (basis * fineness[:, None]).round_().clamp_(-TOP, TOP)
    return codes, (unit / fineness).bfloat16().float() / unit


def _left(table: Table, right: Tensor, alone: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Codes of rows along directions (ranks, n), int16 (rows, ranks), none of those that stand alone; and by how much
    the step of a row must be coarser, for its codes to be said: a power of two, (rows,)."""
    solve = torch.linalg.pinv(right.double()).float()
    codes, coarser = [], []
    for part, x in table.strips():
        x = x / step
        along = (x @ solve) * ~alone[part, None]
        top = torch.cat([x, along], 1).abs().amax(1) / TOP
        octaves = top.clamp_min(1.0).log2().ceil().minimum(table.rows[part] + float(SHIFTED))
        coarser.append(torch.exp2(octaves))
        codes.append(along / coarser[-1][:, None])
    left = torch.cat(codes)
    zone = dead_zone(
        left[~alone].abs().mean(0) if not alone.all() else left.new_zeros(left.shape[1])
    )
    return rounded(left, zone).to(torch.int16), torch.cat(coarser)


def _paid(left: Tensor, along: Tensor, coarser: Tensor, layout: CodeLayout) -> Tensor:
    """Which directions are worth what their codes take as they are: bool (ranks,). left: int16 (rows, ranks); along:
    what they stand for, in the steps of their rows, which are so much coarser, (rows,)."""
    missed = torch.where(left == 0, along, along - left)
    gain = coarser.square() @ (along.square() - missed.square())
    bits = coded_rows.bits(left.T.contiguous().cpu(), layout).to(gain)
    return gain > PRICE * (bits + 8 * RANK_BYTES)


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
