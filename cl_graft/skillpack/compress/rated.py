"""A pack of whole numbers within a budget: one step for all tensors, corrected as the bytes come in.

What every tensor's rows cost at a step is estimated beforehand. Tensors are then encoded in turn, and before each the
step is chosen anew, so that what is left of the budget is just used by what is left to do: the estimate's errors are
made up for on the way, and the last tensors are encoded again until the file fits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from cl_graft.errors import OverBudget
from cl_graft.skillpack.codecs import CodeLayout, Encoded, Meta, Spec, payload_bytes
from cl_graft.skillpack.compress.compress import (
    ByteLimit,
    Piece,
    Work,
    alike,
    fetch,
    groups,
    importance,
    kept,
    put,
    slope_of,
)
from cl_graft.skillpack.compress.factorise import Spectrum, damped, spectrum
from cl_graft.skillpack.compress.gptq import factorised
from cl_graft.skillpack.compress.memory import release
from cl_graft.skillpack.compress.rate import (
    GRID,
    Rate,
    Table,
    Weighted,
    encode_matrices,
    encode_table,
    encode_vector,
    matrix_rate,
    root_mean_square,
    table_rate,
)
from cl_graft.skillpack.compress.work_store import Item

FINEST = 1500.0  # codes of a tensor's largest row have at most this mean magnitude
SHARE = 0.99  # of the budget that is used at least, where there is so much to store
MARGIN = 0.002  # of the budget, kept back until the last tensor
TRIES = 8  # of one group, until the file fits
ROUNDS = 3  # of the tables, until their step is that of the matrices


def rated(work: Work, limit: ByteLimit, layout: CodeLayout) -> dict[str, Spec]:
    """Encode all pieces; results go into the work store. A tensor of which nothing is worth keeping is left out.

    Raises OverBudget.
    """
    rates = measured(work, layout)
    tables = [[p] for p in work.pieces if p.name in rates and p.kind == "table"]
    matrices = [[p for p in g if p.name in rates] for g in groups(work) if g[0].kind == "matrix"]
    control = Control(work, limit, layout, rates, tables + [g for g in matrices if g])
    control.vectors()
    step = control.step()
    for _ in range(ROUNDS if tables else 0):
        for group in tables:
            control.encode(group, step)
        before, step = step, control.step()
        if not matrices or abs(math.log2(step / before)) < 0.1:
            break
    total, done = sum(math.prod(p.shape) for group in matrices for p in group) or 1, 0
    for group in matrices:
        if group:
            control.encode(group, control.step())
        done += sum(math.prod(p.shape) for p in group)
        release()
        work.progress("compressing", done / total)
    control.settle()
    return control.specs()


@dataclass
class Control:
    """The step for what is left to do, from what was estimated of a group and what it then took."""

    work: Work
    limit: ByteLimit
    layout: CodeLayout
    rates: Mapping[str, Rate]
    groups: list[list[Piece]]
    kept: dict[str, Spec] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)  # by a group's first name

    def vectors(self) -> None:
        """Encode norms and biases. Raises OverBudget where they alone are too much."""
        for piece in self.work.pieces:
            if piece.kind == "vector":
                self.kept[piece.name] = kept(self.work, piece, lambda p=piece: encode_vector(p.delta(), self.layout))
        if self.limit.cost(self.kept) > self.limit.bytes:
            raise OverBudget(
                f"the budget {self.limit.text} ({self.limit.bytes} bytes) does not hold norms and biases; raise it."
            )

    def specs(self) -> dict[str, Spec]:
        """What was kept, in the order of the pieces."""
        return {p.name: self.kept[p.name] for p in self.work.pieces if p.name in self.kept}

    def step(self) -> float:
        """The step at which, as far as can be told, what is left to do just uses what is left of the budget."""
        ahead = [p for group in self.groups if group[0].name not in self.steps for p in group]
        bare = {p.name: _bare(p, self.layout) for p in ahead}
        left = (1 - MARGIN) * self.limit.bytes - self.limit.cost(self.kept | bare)
        wanted = torch.zeros(len(GRID), dtype=torch.float64)
        for kind in ("table", "matrix"):
            curves = [self.rates[p.name].bytes for p in ahead if p.kind == kind]
            wanted += self._right(kind) * torch.stack(curves).sum(0) if curves else 0.0
        finest = max(self.rates[p.name].largest for group in self.groups for p in group) / FINEST
        return max(finest, Rate(wanted, 0.0).step(left))

    def encode(self, group: list[Piece], step: float) -> None:
        """Encode tensors that read the same input at a step, or take what an earlier run made of them."""
        store, key = self.work.store, f"step/{group[0].name}"
        if key in store and store[key].about["step"] == step:
            found = [p for p in group if f"encoded/{p.name}" in store]
            self.kept |= {p.name: fetch(store, p.name).spec for p in found}
        else:
            for piece, encoded in zip(group, _encoded(self.work, group, step, self.layout), strict=True):
                self.kept.pop(piece.name, None)
                if encoded is not None and not piece.present and not encoded.meta.get("kept", 1):
                    encoded = None
                if encoded is not None:
                    self.kept[piece.name] = put(store, piece.name, encoded)
                elif f"encoded/{piece.name}" in store:
                    del store[f"encoded/{piece.name}"]
            store[key] = Item({}, {"step": step})
        self.steps[group[0].name] = step

    def settle(self) -> None:
        """Encode the last groups again, until the file fits and uses SHARE of the budget."""
        for group in reversed(self.groups):
            first = step = self.steps[group[0].name]
            low, high = 0.0, math.inf  # steps known to be too fine, and to fit
            for _ in range(TRIES):
                left = self.limit.bytes - self.limit.cost(self.kept)
                if 0 <= left <= (1 - SHARE) * self.limit.bytes:
                    return
                low, high = (low, step) if left >= 0 else (step, high)
                step = self._better(group, step, left, low, high)
                if step < first / 2:  # filling up with one group's last bits is waste
                    break
                self.encode(group, step)
            if self.limit.cost(self.kept) > self.limit.bytes and high < math.inf:
                self.encode(group, high)
        if self.limit.cost(self.kept) > self.limit.bytes:
            raise OverBudget(f"the budget {self.limit.text} ({self.limit.bytes} bytes) is too small; raise it.")

    def _better(self, group: list[Piece], step: float, left: int, low: float, high: float) -> float:
        """A step nearer to that at which a group takes `left` bytes more."""
        took = sum(payload_bytes(*self.kept[p.name]) for p in group if p.name in self.kept)
        about = Rate(torch.stack([self.rates[p.name].bytes for p in group]).sum(0), 0.0)
        wanted = max(0.0, took + left - 0.3 * (1 - SHARE) * self.limit.bytes) / max(1, took)
        better = about.step(wanted * about.at(step))
        if low < better < high:
            return better
        return (low * high) ** 0.5 if low and high < math.inf else step * (1.1 if left < 0 else 0.9)

    def _right(self, kind: str) -> float:
        """By how much the estimates of a kind were wrong so far."""
        done = [g for g in self.groups if g[0].name in self.steps and g[0].kind == kind]
        about = sum(self.rates[p.name].at(self.steps[g[0].name]) for g in done for p in g)
        took = sum(payload_bytes(*self.kept[p.name]) for g in done for p in g if p.name in self.kept)
        return min(4.0, max(0.25, took / about)) if about > 1000 else 1.0


def measured(work: Work, layout: CodeLayout) -> dict[str, Rate]:
    """What the rows of every matrix and table cost, and the spectra of matrices into the work store."""
    rates: dict[str, Rate] = {}
    total, done = sum(math.prod(p.shape) for p in work.pieces) or 1, 0
    for group in groups(work):
        hessian, pivot = None, 1.0
        for piece in group:
            key = f"rate/{piece.name}"
            if piece.kind == "vector":
                continue
            if key not in work.store:
                if piece.kind == "matrix" and hessian is None and (read := work.hessian(piece)) is not None:
                    hessian = damped(read, work.policy.damping)
                    pivot = root_mean_square(factorised(read, work.policy.damping, scaled=False)[1])
                rate, slope = _measured(work, piece, hessian, pivot, layout)
                about = {"largest": rate.largest, "slope": slope}
                work.store[key] = Item({"bytes": rate.bytes}, about)
            tensors, about = work.store[key]
            rates[piece.name] = Rate(tensors["bytes"], about["largest"])
        done += sum(math.prod(piece.shape) for piece in group)
        release()
        work.progress("measuring", done / total)
    return {name: rate for name, rate in rates.items() if rate.largest > 0}


def _measured(
    work: Work, piece: Piece, hessian: Tensor | None, pivot: float, layout: CodeLayout
) -> tuple[Rate, float]:
    """The rate of a tensor, and what a squared unit of its output costs."""
    if piece.kind == "table":
        return table_rate(_table(work, piece), layout), 1.0
    delta = work.delta(piece)
    found = spectrum(delta, hessian)
    work.store[f"spectrum/{piece.name}"] = Item({"energy": found.energy, "basis": found.basis}, {"wide": found.wide})
    slope = slope_of(work.moments, piece.name)
    if slope is None:
        slope = alike(found.energy) if work.moments.reads else torch.ones(())
    return matrix_rate(Weighted(delta, found, float(slope)), hessian, pivot, layout), float(slope)


def _encoded(work: Work, group: list[Piece], step: float, layout: CodeLayout) -> list[Encoded | None]:
    if group[0].kind == "table":
        return [encode_table(_table(work, group[0]), group[0].shape, step, layout)]
    matrices = []
    for piece in group:
        tensors, about = work.store[f"spectrum/{piece.name}"]
        found = Spectrum(tensors["energy"], tensors["basis"].to(work.device), about["wide"])
        slope = work.store[f"rate/{piece.name}"].about["slope"]
        matrices.append(Weighted(work.delta(piece), found, slope, piece.transposed))
    return encode_matrices(matrices, work.hessian(group[0]), step, layout, work.policy.damping)


def _table(work: Work, piece: Piece) -> Table:
    """A table with the weights of its entries as a product of rows' and columns'."""
    whole = piece.delta().to(work.device, torch.float32)
    delta = whole.reshape(len(whole), -1) if whole.ndim > 1 else whole[None]
    weigh = importance(piece, whole, work.moments)
    rows, columns = torch.empty(len(delta), device=delta.device), torch.zeros(delta.shape[1], device=delta.device)
    for start in range(0, len(delta), step := max(1, (1 << 22) // delta.shape[1])):
        part = slice(start, start + step)
        weights = weigh(part)
        weights = weights.expand(len(delta[part]), delta.shape[1]) if weights.ndim < 2 else weights.expand(len(delta[part]), -1)
        rows[part] = weights.mean(1)
        columns += weights.sum(0)
    return Table(delta, rows, columns / columns.mean().clamp_min(1e-30))


def _bare(piece: Piece, layout: CodeLayout) -> Spec:
    """What a header says at least of a tensor."""
    lies: Meta = {"layout": layout, "bytes": 0} | ({"top": 99} if layout == "small" else {})
    if piece.kind == "table":
        return "coded", piece.shape, {"kept": 0, "columns": 1, "gap": [1, 0], **lies}
    return "coded_low_rank", piece.shape, {"rank": 0, **lies}
