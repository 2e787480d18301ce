"""Encoded tensors from deltas, within a budget: measure every tensor, find one plan for all, encode.

Nothing here holds more than the tensors that read one input, and their Hessian, at a time: deltas are asked for
when their turn comes, and what is finished goes into a work store (work_store.py), where a killed run finds it again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from cl_graft.errors import OverBudget
from cl_graft.skillpack.codecs import Encoded, Spec, dense, sparse, sparse_top
from cl_graft.skillpack.compress import auto_gptq
from cl_graft.skillpack.compress.calibrate import Moments
from cl_graft.skillpack.compress.factorise import (
    Factored,
    Spectrum,
    damped,
    encode,
    spec_of,
    spectrum,
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
    moments: Moments,
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
    require_solver(policy, pieces)
    work = _Work(list(pieces), moments, policy, store, torch.device(device), progress)
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


def require_solver(policy: Policy, pieces: Sequence[Piece]) -> None:
    """Raise CLGraftError where the policy's solver is not installed, or not for these matrices."""
    if policy.solver == "auto-gptq":
        auto_gptq.require(p.name for p in pieces if p.kind == "matrix" and p.transposed)


def fetch(store: WorkStore, name: str) -> Encoded:
    """An encoded tensor, from the work store."""
    tensors, about = store[f"encoded/{name}"]
    return Encoded(about["codec"], tuple(about["shape"]), about["meta"], tensors)


@dataclass(frozen=True)
class _Work:
    pieces: list[Piece]
    moments: Moments
    policy: Policy
    store: WorkStore
    device: torch.device
    progress: PackProgress

    def delta(self, piece: Piece) -> Tensor:
        """The delta of a matrix, float32 (out, in)."""
        delta = piece.delta().to(self.device, torch.float32)
        return delta.T.contiguous() if piece.transposed else delta

    def hessian(self, piece: Piece) -> Tensor | None:
        moment = self.moments.hessian(piece.name)
        return None if moment is None or moment.ndim != 2 else moment.to(self.device, torch.float32)


def measure(work: _Work) -> dict[str, Profile]:
    """Measure what every tensor's ranks or entries are worth."""
    profiles: dict[str, Profile] = {}
    total, done = sum(prod(p.shape) for p in work.pieces), 0
    for group in _groups(work):
        hessian = None
        for piece in group:
            key = f"worth/{piece.name}"
            if piece.kind == "vector":
                continue
            if key not in work.store:
                if piece.kind == "matrix" and work.policy.activation_aware and hessian is None:
                    hessian = work.hessian(piece)
                    hessian = None if hessian is None else damped(hessian, work.policy.damping)
                work.store[key] = Item({"worth": _measured(work, piece, hessian)}, {})
            shape = piece.shape[::-1] if piece.transposed else piece.shape
            worth = work.store[key].tensors["worth"]
            profiles[piece.name] = Profile(piece.kind, piece.role, shape, worth)
        done += sum(prod(piece.shape) for piece in group)
        release()
        work.progress("measuring", done / total)
    return {piece.name: profiles[piece.name] for piece in work.pieces if piece.name in profiles}


def _measured(work: _Work, piece: Piece, hessian: Tensor | None) -> Tensor:
    """What its ranks or entries are worth (see Profile); a matrix's spectrum goes into the work store."""
    if piece.kind == "table":
        delta = piece.delta().to(work.device, torch.float32)
        parts = (bins(part).cpu() for part in _worth(piece, delta, work.moments))
        return torch.stack(list(parts)).sum(0)
    factors = spectrum(work.delta(piece), hessian)
    scale = _slope(work.moments, piece.name)
    if scale is None:
        scale = torch.tensor(1.0) if not work.moments.reads else _alike(factors.energy)
    tensors = {"energy": factors.energy, "basis": factors.basis}
    work.store[f"spectrum/{piece.name}"] = Item(tensors, {"wide": factors.wide})
    return (factors.energy * scale.to(factors.energy.device)).cpu()


def _worth(piece: Piece, delta: Tensor, moments: Moments) -> Iterator[Tensor]:
    """Squared loss that dropping each entry of a table costs, some rows at a time."""
    weigh = importance(piece, delta, moments)
    for start in range(0, len(delta), step := max(1, TABLE_CHUNK // prod(delta.shape[1:]))):
        rows = slice(start, start + step)
        yield delta[rows].square().mul_(weigh(rows))


def importance(piece: Piece, delta: Tensor, moments: Moments) -> Callable[[slice], Tensor]:
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
    read, written = moments.hessian(piece.name), moments.outputs.get(piece.name)
    if read is None or written is None or len(piece.shape) != 2:
        reads = torch.tensor(1.0) if read is None or read.ndim != 2 else read.diagonal().mean()
        slope = _slope(moments, piece.name)
        scale = (reads.cpu() * (1.0 if slope is None else slope)).to(delta)
        return lambda rows: scale
    diagonal = (read.diagonal() if read.ndim == 2 else read).to(delta)
    written = written.to(delta)
    if read.ndim == 2 and not piece.transposed:  # (out, in)
        return lambda rows: written[rows, None] * diagonal
    head = moments.hessian(piece.head) if piece.head else None
    if read.ndim == 2 or head is None or piece.head is None:
        return lambda rows: diagonal[rows, None] * written
    as_head, seen = moments.outputs[piece.head].to(delta), head.diagonal().to(delta)
    return lambda rows: diagonal[rows, None] * written + as_head[rows, None] * seen


def _alike(energy: Tensor) -> Tensor:
    """The factor that makes the sum of these one."""
    return (1 / energy.sum(dtype=torch.float64).clamp_min(1e-300)).to(energy)


def _slope(moments: Moments, name: str) -> Tensor | None:
    """Mean squared gradient at a tensor's output, float64; of one that is not known, the average of all."""
    if not moments.outputs:
        return None
    if name in moments.outputs:
        return moments.outputs[name].double().mean().cpu()
    return torch.stack([g.double().mean().cpu() for g in moments.outputs.values()]).mean()


def _groups(work: _Work) -> list[list[Piece]]:
    """Matrices that read the same input, together; every other tensor by itself."""
    groups: dict[str, list[Piece]] = {}
    for piece in work.pieces:
        key = work.moments.reads.get(piece.name) if piece.kind == "matrix" else None
        groups.setdefault(piece.name if key is None else f"reads {key}", []).append(piece)
    return list(groups.values())


def fitting(
    policy: Policy, profiles: Mapping[str, Profile], fixed: Mapping[str, Spec], limit: ByteLimit
) -> Plan:
    """The largest plan that, with what is fixed, fits the limit; a table's bytes are estimated."""

    spec = spec_of if policy.solver == "cl-graft" else auto_gptq.spec_of

    def left(plan: Plan) -> int:
        specs, about = dict(fixed), 0
        for name, profile in profiles.items():
            if profile.kind == "matrix" and plan.counts[name]:
                rows, cols = profile.shape
                specs[name] = spec(plan.counts[name], (rows, cols), policy.group_size)
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


def _pruned(piece: Piece, plan: Plan, moments: Moments) -> Encoded:
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
    specs: dict[str, Spec] = {}
    total, done = sum(prod(p.shape) for p in work.pieces if p.name in plan.counts) or 1, 0
    for group in _groups(work):
        wanted = [p for p in group if plan.counts.get(p.name)]
        if all(f"encoded/{p.name}" in work.store for p in wanted):
            specs |= {p.name: fetch(work.store, p.name).spec for p in wanted}
        else:
            made = zip(wanted, _encoded(work, wanted, plan), strict=True)
            specs |= {p.name: _put(work.store, p.name, encoded) for p, encoded in made}
        done += sum(prod(p.shape) for p in group if p.name in plan.counts)
        release()
        work.progress("compressing", done / total)
    return specs


def _encoded(work: _Work, group: list[Piece], plan: Plan) -> list[Encoded]:
    """Matrices that read the same input, in one solve."""
    items = []
    for piece in group:
        tensors, about = work.store[f"spectrum/{piece.name}"]
        factors = Spectrum(tensors["energy"], tensors["basis"].to(work.device), about["wide"])
        items.append(
            Factored(work.delta(piece), factors, plan.counts[piece.name], piece.transposed)
        )
    options: dict[str, Any] = {
        "group_size": work.policy.group_size,
        "damping": work.policy.damping,
        "act_order": work.policy.act_order,
    }
    if work.policy.solver == "auto-gptq":
        return auto_gptq.encode(items, work.hessian(group[0]), **options)
    return encode(
        items,
        work.hessian(group[0]),
        **options,
        aware=work.policy.activation_aware,
        refit=work.policy.refit,
    )
