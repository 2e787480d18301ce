"""A pack of whole numbers within a budget: one step for all tensors, corrected as the bytes come in.

What every tensor's rows cost at a step is estimated beforehand. Tensors are then encoded in turn, and before each the
step is chosen anew, so that what is left of the budget is just used by what is left to do: the estimate's errors are
made up for on the way, and the last tensors are encoded again until the file fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import torch
from torch import Tensor

from cl_graft.errors import OverBudget
from cl_graft.skillpack.codecs import (
    CodeLayout,
    Encoded,
    Meta,
    Spec,
    coded_low_rank_stack,
    payload_bytes,
)
from cl_graft.skillpack.compress.policy import Adaptive
from cl_graft.skillpack.compress.rate import (
    GRID,
    Rate,
    Weighted,
    encode_matrices,
    ranks_at,
    ranks_of,
    trimmed,
)
from cl_graft.skillpack.compress.rates import rates_of, weighed
from cl_graft.skillpack.compress.tables import encode_table, vector_ways
from cl_graft.skillpack.compress.work import (
    Piece,
    Read,
    Stack,
    Work,
    fetch,
    kept,
    put,
    visit,
)
from cl_graft.skillpack.compress.work_store import Item
from cl_graft.skillpack.memory import release

SHARE = 0.99  # of the budget that is used at least, where there is so much to store
MARGIN = 0.002  # of the budget, kept back until the last tensors
TRIES = 8  # of the last tensors, until the file fits
EXACT = 16  # of the last pieces, for which the header is written to know its size
ROUNDS = 3  # of the tables, until their step is that of the matrices


def rated(work: Work, policy: Adaptive) -> dict[str, Spec]:
    """Encode all pieces; results go into the work store. A tensor of which nothing is worth keeping is left out.

    Raises OverBudget.
    """
    control = Control(work, policy.layout, rates_of(work, policy.layout))
    control.vectors()
    control.tables()
    total, done = sum(math.prod(p.shape) for p in work.pieces if p.kind == "matrix") or 1, 0

    def use(reads: list[Read]) -> None:
        nonlocal done
        control.matrices(reads)
        for piece in (piece for read in reads for piece in read.pieces):
            work.directions.drop(piece.name)
            done += math.prod(piece.shape)
        release()
        work.progress("compressing", done / total)

    visit(work, use, lambda pieces: any(p.name in control.ahead for p in pieces))
    control.trim()
    return control.kept


@dataclass
class Control:
    """The step for what is left to do, from what was estimated of the others and what they then took.

    kept: tensors that are in the pack so far. steps: at which matrices, those of stacks one by one, and tables were
    encoded.
    """

    work: Work
    layout: CodeLayout
    rates: Mapping[str, Rate]
    kept: dict[str, Spec] = field(default_factory=dict)
    steps: dict[str, float] = field(default_factory=dict)
    _sizes: dict[str, tuple[Spec, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        store = self.work.store
        for first in self._pieces:
            if f"step/{first}" not in store:
                continue
            about = store[f"step/{first}"].about
            for name in about["names"]:
                self.steps[name] = about["step"]
            for name in about["kept"]:
                self.kept[name] = fetch(store, name).spec

    @property
    def ahead(self) -> dict[str, Piece]:
        """What is left to do, by name."""
        return {name: piece for name, piece in self._pieces.items() if name not in self.steps}

    @property
    def left(self) -> int:
        """Bytes of the budget that are not used yet."""
        return self.work.limit.bytes - self.work.limit.cost(self.kept)

    def vectors(self) -> None:
        """Encode norms and biases. Raises OverBudget where they alone are too much."""
        for piece in self.work.pieces:
            if piece.kind == "vector":
                make = partial(self._vector, piece)
                self.kept[piece.name] = kept(self.work, piece, make)
        if self.left < 0:
            limit = self.work.limit
            raise OverBudget(
                f"the budget {limit.text} ({limit.bytes} bytes) does not hold norms and biases; raise it."
            )

    def _vector(self, piece: Piece) -> Encoded:
        """The way that takes less, by the file's own count."""
        ways = vector_ways(piece.delta(), self.layout)
        return min(ways, key=lambda way: self.work.limit.cost({piece.name: way.spec}))

    def tables(self) -> None:
        """Encode embeddings, heads and the like, at the step that the matrices are then left with."""
        tables = [p for p in self.ahead.values() if p.kind == "table"]
        if not tables:
            return
        step, found = self.step(), dict[str, Encoded]()
        for _ in range(ROUNDS):
            self._tables(tables, step, found)
            before, step = step, self.step()
            if not self.ahead or abs(math.log2(step / before)) < 0.1:
                break
        while self._spare() < 0 and any(map(_says, found.values())):
            self._tables(tables, 1.25 * self.steps[tables[0].name], found)
        self._finish(tables, found)

    def _tables(self, tables: list[Piece], step: float, found: dict[str, Encoded]) -> None:
        for piece in tables:
            basis = self.work.store[f"rate/{piece.name}"].tensors["basis"].to(self.work.device)
            table = weighed(self.work, piece)
            encoded = encode_table(table, basis, piece.shape, step, self.layout)
            found.pop(piece.name, None)
            if _says(encoded) or piece.present:
                found[piece.name] = encoded
        self._note(tables, found, step)

    def matrices(self, reads: Sequence[Read]) -> None:
        """Encode matrices at one step; the last ones again and again, until the file fits."""
        ahead = self.ahead
        todo = [Read([p for p in read.pieces if p.name in ahead], read.hessian) for read in reads]
        todo = [read for read in todo if read.pieces]
        pieces = [piece for read in todo for piece in read.pieces]
        if not pieces:
            return
        step = first = self.step()
        last = len(pieces) == len(ahead)
        low, high = 0.0, math.inf  # steps known to be too fine, and to fit
        for _ in range(TRIES if last else 1):
            found = self._encoded(todo, step, first)
            self._note(pieces, found, step)
            if not last or 0 <= self.left <= (1 - SHARE) * self.work.limit.bytes:
                break
            low, high = (low, step) if self.left >= 0 else (step, high)
            step = self._better(pieces, step, low, high)
            if step < first / 8:  # filling up with the last bits of one group is waste
                break
        if high < math.inf and self.left < 0:
            found = self._encoded(todo, high, first)
            self._note(pieces, found, high)
        self._finish(pieces, found)

    def _encoded(self, reads: Sequence[Read], step: float, first: float) -> dict[str, Encoded]:
        """Tensors of what is kept of these matrices, input by input. first: the step that directions are found for."""
        found: dict[str, Encoded] = {}
        stacks: dict[Stack, dict[int | None, Encoded | None]] = {}
        for pieces, hessian in reads:
            under = self.work.under(hessian)
            items = self._weighted(pieces, under, first)
            made = encode_matrices(items, under, step, self.layout)
            for piece, encoded in zip(pieces, made, strict=True):
                if piece.stack:
                    stacks.setdefault(piece.stack, {})[piece.expert] = encoded
                elif encoded:
                    found[piece.name] = encoded
        for (name, shape), parts in stacks.items():
            if any(parts.values()):
                matrices = [parts.get(i) for i in range(shape[0])]
                found[name] = coded_low_rank_stack(matrices, shape, self.layout)
        return found

    def trim(self) -> None:
        """Drop the least ranks of the largest matrices, for as long as the file is too large. Raises OverBudget."""
        while self.left < 0:
            matrices = {piece.tensor for piece in self._pieces.values() if piece.kind == "matrix"}
            names = [n for n in self.kept if n in matrices and ranks_of(self.kept[n][2])]
            if not names:
                limit = self.work.limit
                raise OverBudget(
                    f"the budget {limit.text} ({limit.bytes} bytes) is too small; raise it."
                )
            name = max(names, key=lambda n: self.kept[n][2]["bytes"])
            encoded = trimmed(fetch(self.work.store, name))
            self.kept[name] = put(self.work.store, name, encoded)

    def step(self) -> float:
        """The step at which, as far as can be told, what is left to do just uses what is left of the budget."""
        ahead = self.ahead
        left = self._spare() - MARGIN * self.work.limit.bytes
        wanted = torch.zeros(len(GRID), dtype=torch.float64)
        for kind in ("table", "matrix"):
            curves = [self.rates[n].bytes for n, piece in ahead.items() if piece.kind == kind]
            wanted += self._right(kind) * torch.stack(curves).sum(0) if curves else 0.0
        return Rate(wanted, 0.0).step(left)

    def _spare(self) -> int:
        """Bytes that are left for all that is left to do, beside what the header says of it: as is likely, or for the
        last pieces as it is so far. (The same after a kill: it depends on what is done alone.)"""
        ahead = list(self.ahead.values())
        held = self._payload(self.kept)
        said = self._header if len(ahead) > EXACT else self._around(self.kept | self._likely(ahead))
        return self.work.limit.bytes - said - held

    @cached_property
    def _header(self) -> int:
        """About the bytes of the file beside what tensors hold."""
        vectors = {p.name: self.kept[p.name] for p in self.work.pieces if p.kind == "vector"}
        return self._around(vectors | self._likely(self._pieces.values()))

    def _around(self, specs: Mapping[str, Spec]) -> int:
        return self.work.limit.cost(specs) - self._payload(specs)

    def _likely(self, pieces: Iterable[Piece]) -> dict[str, Spec]:
        return {piece.tensor: _likely(piece, self.layout) for piece in pieces}

    @property
    def _pieces(self) -> dict[str, Piece]:
        return {p.name: p for p in self.work.pieces if p.name in self.rates}

    def _note(self, pieces: list[Piece], found: Mapping[str, Encoded], step: float) -> None:
        for piece in pieces:
            self.steps[piece.name] = step
            self.kept.pop(piece.tensor, None)
        self.kept |= {name: encoded.spec for name, encoded in found.items()}

    def _finish(self, pieces: list[Piece], found: Mapping[str, Encoded]) -> None:
        store = self.work.store
        for name in found:
            put(store, name, found[name])
        first, names = pieces[0].name, [piece.name for piece in pieces]
        about = {"step": self.steps[first], "names": names, "kept": list(found)}
        store[f"step/{first}"] = Item({}, about)

    def _weighted(self, group: list[Piece], under: Tensor | None, step: float) -> list[Weighted]:
        items = []
        for piece in group:
            slope = self.work.store[f"rate/{piece.name}"].about["slope"]
            energy = self.work.directions.energy(piece.name)
            delta = self.work.delta(piece)
            ranks = ranks_at(energy, slope, tuple(delta.shape), step)
            found = self.work.directions.take(piece.name, delta, under, ranks)
            items.append(Weighted(delta, found, slope, piece.transposed))
        return items

    def _better(self, group: list[Piece], step: float, low: float, high: float) -> float:
        """A step at which a group takes nearly all that is left, between two that are known."""
        took = self._took(group)
        about = Rate(torch.stack([self.rates[p.name].bytes for p in group]).sum(0), 0.0)
        room = took + self.left - 0.3 * (1 - SHARE) * self.work.limit.bytes
        better = about.step(max(0.0, room) / max(1, took) * about.at(step))
        if low < better < high and better != step:
            return better
        if low and high < math.inf:
            return (low * high) ** 0.5
        return step * (1.1 if self.left < 0 else 0.9)

    def _right(self, kind: str) -> float:
        """Factor by which the estimates of a kind were wrong so far."""
        done = [p for n, p in self._pieces.items() if n in self.steps and p.kind == kind]
        about = sum(self.rates[p.name].at(self.steps[p.name]) for p in done)
        return min(4.0, max(0.25, self._took(done) / about)) if about > 1000 else 1.0

    def _took(self, pieces: Iterable[Piece]) -> int:
        """Bytes of the tensors of these pieces, without what the header says of them."""
        names = {piece.tensor for piece in pieces}
        return self._payload({name: self.kept[name] for name in names if name in self.kept})

    def _payload(self, specs: Mapping[str, Spec]) -> int:
        """Bytes of what tensors hold."""
        for name, spec in specs.items():
            if name not in self._sizes or self._sizes[name][0] is not spec:
                self._sizes[name] = spec, payload_bytes(*spec)
        return sum(self._sizes[name][1] for name in specs)


def _says(encoded: Encoded) -> bool:
    """Whether anything of a table is kept."""
    return bool(encoded.meta["kept"] or encoded.meta.get("rank"))


def _likely(piece: Piece, layout: CodeLayout) -> Spec:
    """What a header may say of a tensor: its numbers have about as many digits as they will."""
    shape = piece.stack.shape if piece.stack else piece.shape
    rows, cols = shape[-2], shape[-1]
    rank = min(99, rows, cols)
    size = 4 * (rank * (rows + cols) // 16)
    lies: Meta = {"layout": layout, "bytes": size} | ({"top": 999} if layout == "small" else {})
    if piece.stack:
        return "coded_low_rank_stack", shape, {"ranks": [rank] * shape[0], **lies}
    if piece.kind == "matrix":
        return "coded_low_rank", shape, {"rank": rank, **lies}
    kept = {"kept": min(99, shape[0]), "gap": [1, 0]}
    if len(shape) == 2:
        return "coded_table", shape, {"rank": rank, **kept, **lies}
    return "coded", shape, {**kept, "columns": 1, **lies}
