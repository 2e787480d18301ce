"""Encoded tensors from deltas, within a budget: measure every tensor, find one plan for all, encode.

Nothing here holds more than the tensors that read one input, and their Hessian, at a time: deltas are asked for
when their turn comes, and what is finished goes into a work store (work_store.py), where a killed run finds it again.
Second moments are visited twice, group by group: to measure, and to encode; so nobody need keep them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod

import torch
from torch import Tensor

from cl_graft.errors import OverBudget
from cl_graft.skillpack.codecs import Encoded, Spec, dense, sparse, sparse_top
from cl_graft.skillpack.compress.directions import Directions, Known
from cl_graft.skillpack.compress.factorise import (
    Factored,
    damped,
    encode,
    spec_of,
)
from cl_graft.skillpack.compress.memory import release
from cl_graft.skillpack.compress.policy import (
    Kind,
    Plan,
    Policy,
    Profile,
    bins,
    finer,
    kept_above,
    sparse_bytes,
)
from cl_graft.skillpack.compress.work_store import Item, WorkStore

PackProgress = Callable[[str, float], None]
TABLE_CHUNK = 1 << 22  # entries of a table that are weighed at a time
SMALLEST_SIDE = 4  # a matrix narrower than this has nothing to factorise


@dataclass(frozen=True)
class Piece:
    """One tensor of a delta. delta: gives it, float32 and finite, when its turn comes; it is not written to.

    transposed: a matrix stored (in, out). head: name of the head that this embedding also serves as.
    whole: kept as it is, in bf16. present: in the pack even where nothing of it is worth keeping.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    delta: Callable[[], Tensor]
    transposed: bool = False
    head: str | None = None
    whole: bool = False
    present: bool = False

    @property
    def kind(self) -> Kind:
        if len(self.shape) < 2 or self.whole:
            return "vector"
        inner = self.role in ("attention", "mlp", "other")
        matrix = inner and len(self.shape) == 2 and min(self.shape) >= SMALLEST_SIDE
        return "matrix" if matrix else "table"


@dataclass(frozen=True)
class ByteLimit:
    """What may be used: `cost` of {name: (codec, shape, meta)}, in bytes, must not exceed `bytes`."""

    cost: Callable[[Mapping[str, Spec]], int]
    bytes: int
    text: str  # as the user wrote it


def compress(
    pieces: Sequence[Piece],
    moments: Known,
    policy: Policy,
    limit: ByteLimit,
    store: WorkStore,
    *,
    device: torch.device | str = "cpu",
    progress: PackProgress = lambda what, done: None,
) -> dict[str, Spec]:
    """Encode every piece; results go into the work store (`fetch`), specs are returned, in the order of pieces.

    A tensor of which nothing is worth keeping is left out. Raises OverBudget.
    """
    work = _Work(list(pieces), moments, policy, limit, store, torch.device(device), progress)
    profiles = measure(work)
    fixed: dict[str, Spec] = {}
    for piece in work.pieces:
        if piece.kind == "vector":
            fixed[piece.name] = _kept(work, piece, partial(_whole, piece))
    tables = _tables(work, profiles, fixed, limit)
    matrices = {name: p for name, p in profiles.items() if p.kind == "matrix"}
    specs = fixed | tables
    specs |= _matrices(work, fitting(policy, matrices, specs, limit))
    return {piece.name: specs[piece.name] for piece in work.pieces if piece.name in specs}


def fetch(store: WorkStore, name: str) -> Encoded:
    """An encoded tensor, from the work store."""
    tensors, about = store[f"encoded/{name}"]
    return Encoded(about["codec"], tuple(about["shape"]), about["meta"], tensors)


@dataclass(frozen=True)
class _Work:
    pieces: list[Piece]
    moments: Known
    policy: Policy
    limit: ByteLimit
    store: WorkStore
    device: torch.device
    progress: PackProgress

    def delta(self, piece: Piece) -> Tensor:
        """The delta of a matrix, float32 (out, in)."""
        delta = piece.delta().to(self.device, torch.float32)
        return delta.T.contiguous() if piece.transposed else delta

    @cached_property
    def directions(self) -> Directions:
        shapes = {p.name: p.shape for p in self.pieces if p.kind == "matrix"}
        return Directions(shapes, self.policy, self.limit.bytes, self.store, self.device)

    def under(self, hessian: Tensor | None) -> Tensor | None:
        """What directions are taken under, (in, in); None for those of the plain SVD."""
        if hessian is None or not self.policy.activation_aware:
            return None
        return damped(hessian, self.policy.damping)


def visit(
    work: _Work,
    use: Callable[[list[Piece], Tensor | None], None],
    wanted: Callable[[list[Piece]], bool],
) -> None:
    """Call `use` with the matrices that read one input and their Hessian, group by group, in the order of the model;
    then with each matrix of whose input nothing is known, and None. Groups that are not wanted are passed over."""
    reads, left = work.moments.reads, {p.name: p for p in work.pieces if p.kind == "matrix"}

    def group(name: str) -> list[Piece]:
        return [p for p in left.values() if reads.get(p.name) == name]

    def reached(name: str, moment: Tensor) -> None:
        pieces = group(name)
        if pieces and moment.ndim == 2:
            use(pieces, moment.to(work.device, torch.float32))
            for piece in pieces:
                del left[piece.name]

    work.moments.visit(
        reached, lambda name: name not in reads.values() or bool(wanted(group(name)))
    )
    for piece in left.values():
        if wanted([piece]):
            use([piece], None)


def measure(work: _Work) -> dict[str, Profile]:
    """Measure what every tensor's ranks or entries are worth."""
    total, done = sum(prod(p.shape) for p in work.pieces), 0

    def told(pieces: Sequence[Piece]) -> None:
        nonlocal done
        done += sum(prod(piece.shape) for piece in pieces)
        release()
        work.progress("measuring", done / total)

    def use(pieces: list[Piece], hessian: Tensor | None) -> None:
        under = work.under(hessian)
        for piece in pieces:
            if not work.directions.found(piece.name):
                work.directions.find(piece.name, work.delta(piece), under)
        told(pieces)

    visit(work, use, lambda pieces: not all(work.directions.found(p.name) for p in pieces))
    profiles: dict[str, Profile] = {}
    for piece in work.pieces:
        if piece.kind != "vector":
            shape = piece.shape[::-1] if piece.transposed else piece.shape
            profiles[piece.name] = Profile(piece.kind, piece.role, shape, _measured(work, piece))
        if piece.kind == "table":
            told([piece])
    return profiles


def _measured(work: _Work, piece: Piece) -> Tensor:
    """What its ranks or entries are worth (see Profile)."""
    if piece.kind == "matrix":
        energy, scale = work.directions.energy(piece.name), _slope(work.moments, piece.name)
        if scale is None:
            scale = torch.tensor(1.0) if not work.moments.reads else _alike(energy)
        return energy * scale
    if f"worth/{piece.name}" not in work.store:
        delta = piece.delta().to(work.device, torch.float32)
        parts = [bins(part).cpu() for part in _worth(piece, delta, work.moments)]
        work.store[f"worth/{piece.name}"] = Item({"worth": torch.stack(parts).sum(0)}, {})
    return work.store[f"worth/{piece.name}"].tensors["worth"]


def _worth(piece: Piece, delta: Tensor, moments: Known) -> Iterator[Tensor]:
    """Squared loss that dropping each entry of a table costs, some rows at a time."""
    weigh = importance(piece, delta, moments)
    for start in range(0, len(delta), step := max(1, TABLE_CHUNK // prod(delta.shape[1:]))):
        rows = slice(start, start + step)
        yield delta[rows].square().mul_(weigh(rows))


def importance(piece: Piece, delta: Tensor, moments: Known) -> Callable[[slice], Tensor]:
    """What a squared unit of a table's entry costs in squared loss: a function of rows, broadcastable to them.

    For a head the second moment of each input; for an embedding how often its token is read; both times the mean
    square of the gradient at the output. For what is neither (the stacked matrices of experts, say) the average
    gradient of the layers that are. Without gradients every tensor's delta counts the same, and without any data
    every entry of every delta.
    """
    if not moments.outputs:
        one = torch.ones((), device=delta.device)
        squared = torch.linalg.vector_norm(delta, dtype=torch.float64).square()
        alike = _alike(squared[None]).to(delta) if moments.reads else one
        return lambda rows: alike
    read, written = moments.diagonal(piece.name), moments.outputs.get(piece.name)
    if read is None or written is None or len(piece.shape) != 2:
        reads = torch.tensor(1.0) if read is None or len(read) > 1 else read.mean()
        slope = _slope(moments, piece.name)
        scale = (reads.cpu() * (1.0 if slope is None else slope)).to(delta)
        return lambda rows: scale
    read, written = read.to(delta), written.to(delta)
    if len(read) == 1 and not piece.transposed:  # (out, in)
        return lambda rows: written[rows, None] * read
    by_row = read.T if len(read) == 1 else read
    head = moments.diagonal(piece.head) if piece.head else None
    if len(read) == 1 or head is None or piece.head is None:
        return lambda rows: by_row[rows] * written
    as_head, seen = moments.outputs[piece.head].to(delta), head.to(delta)
    return lambda rows: by_row[rows] * written + as_head[rows, None] * seen


def _alike(energy: Tensor) -> Tensor:
    """The factor that makes the sum of these one."""
    return (1 / energy.sum(dtype=torch.float64).clamp_min(1e-300)).to(energy)


def _slope(moments: Known, name: str) -> Tensor | None:
    """Mean squared gradient at a tensor's output, float64; of one that is not known, the average of all."""
    if not moments.outputs:
        return None
    if name in moments.outputs:
        return moments.outputs[name].double().mean().cpu()
    return torch.stack([g.double().mean().cpu() for g in moments.outputs.values()]).mean()


def fitting(
    policy: Policy, profiles: Mapping[str, Profile], fixed: Mapping[str, Spec], limit: ByteLimit
) -> Plan:
    """The largest plan that, with what is fixed, fits the limit; a table's bytes are estimated."""

    def left(plan: Plan) -> int:
        specs, about = dict(fixed), 0
        for name, profile in profiles.items():
            if profile.kind == "matrix" and plan.counts[name]:
                rows, cols = profile.shape
                specs[name] = spec_of(plan.counts[name], (rows, cols), policy.group_size)
            elif profile.kind == "table":
                least = plan.least.get(name)
                kept = plan.top[name] if least is None else kept_above(profile.worth, least)
                about += sparse_bytes(kept, prod(profile.shape))
        return limit.bytes - limit.cost(specs) - about

    low, high = policy.start
    if left(policy.plan(profiles, low)) >= 0:
        return policy.plan(profiles, low)
    if left(policy.plan(profiles, high)) < 0:
        raise OverBudget(
            f"the budget {limit.text} ({limit.bytes} bytes) holds not even what the policy must keep; "
            "raise it, or lower the policy's alpha, beta or rank."
        )
    while high - low > 1e-5 * (policy.start[1] - policy.start[0]):
        middle = (low + high) / 2
        fits = left(policy.plan(profiles, middle)) >= 0
        low, high = (low, middle) if fits else (middle, high)
    return _topped_up(policy, profiles, policy.plan(profiles, high), left, limit.bytes // 200)


def _topped_up(
    policy: Policy,
    profiles: Mapping[str, Profile],
    plan: Plan,
    left: Callable[[Plan], int],
    enough: int,
) -> Plan:
    """Half a rank here and there, until no more than `enough` bytes are left over."""
    spare = left(plan)
    for name in policy.may_grow(profiles):
        while spare > enough:
            before = plan.counts[name]
            plan.counts[name] = finer(before)
            now = left(plan)
            if plan.counts[name] == before or now < 0:
                plan.counts[name] = before
                break
            spare = now
    return plan


def _tables(
    work: _Work, profiles: Mapping[str, Profile], fixed: Mapping[str, Spec], limit: ByteLimit
) -> dict[str, Spec]:
    """Embeddings, heads and the like, at the price that all tensors share."""
    allowed = limit.bytes
    while True:
        plan = fitting(work.policy, profiles, fixed, replace(limit, bytes=allowed))
        specs = {
            piece.name: _kept(work, piece, partial(_pruned, piece, plan, work.moments))
            for piece in work.pieces
            if piece.kind == "table"
        }
        needed = {piece.name for piece in work.pieces if piece.present}
        specs = {n: spec for n, spec in specs.items() if spec[2]["kept"] or n in needed}
        over = limit.cost({**fixed, **specs}) - limit.bytes
        if over <= 0:
            return specs
        allowed -= over + 64  # the estimate of their bytes was too low
        for name in specs:
            del work.store[f"encoded/{name}"]


def _whole(piece: Piece) -> Encoded:
    return dense(piece.delta())


def _pruned(piece: Piece, plan: Plan, moments: Known) -> Encoded:
    delta = piece.delta()
    if piece.name in plan.top:
        return sparse_top(delta, plan.top[piece.name])
    least = plan.least[piece.name]
    return sparse(delta, torch.cat([part > least for part in _worth(piece, delta, moments)]))


def _kept(work: _Work, piece: Piece, make: Callable[[], Encoded]) -> Spec:
    """The spec of an encoded tensor, from the work store or made now."""
    if f"encoded/{piece.name}" in work.store:
        return fetch(work.store, piece.name).spec
    return _put(work.store, piece.name, make())


def _put(store: WorkStore, name: str, encoded: Encoded) -> Spec:
    about = {"codec": encoded.codec, "shape": list(encoded.shape), "meta": encoded.meta}
    store[f"encoded/{name}"] = Item(encoded.parts, about)
    return encoded.spec


def _matrices(work: _Work, plan: Plan) -> dict[str, Spec]:
    total, done = sum(prod(p.shape) for p in work.pieces if p.name in plan.counts) or 1, 0

    def use(pieces: list[Piece], hessian: Tensor | None) -> None:
        nonlocal done
        planned = [p for p in pieces if plan.counts.get(p.name)]
        for piece, made in zip(planned, _encoded(work, planned, plan, hessian), strict=True):
            _put(work.store, piece.name, made)
        for piece in pieces:
            work.directions.drop(piece.name)
        done += sum(prod(p.shape) for p in pieces)
        release()
        work.progress("compressing", done / total)

    def wanted(pieces: list[Piece]) -> bool:
        return any(plan.counts[p.name] and f"encoded/{p.name}" not in work.store for p in pieces)

    visit(work, use, wanted)
    work.progress("compressing", 1.0)
    return {n: fetch(work.store, n).spec for n, counts in plan.counts.items() if counts}


def _encoded(work: _Work, group: list[Piece], plan: Plan, hessian: Tensor | None) -> list[Encoded]:
    """Matrices that read the same input, in one solve."""
    under, items = work.under(hessian), []
    for piece in group:
        counts, delta = plan.counts[piece.name], work.delta(piece)
        found = work.directions.take(piece.name, delta, under, sum(counts.values()))
        items.append(Factored(delta, found, counts, piece.transposed))
    return encode(
        items,
        hessian,
        group_size=work.policy.group_size,
        damping=work.policy.damping,
        act_order=work.policy.act_order,
        aware=work.policy.activation_aware,
        refit=work.policy.refit,
    )
