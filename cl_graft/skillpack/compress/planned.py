"""The paper's policy: ranks and entries are counted out beforehand, by a scale that is lowered until the pack fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

from torch import Tensor

from cl_graft.errors import OverBudget
from cl_graft.skillpack.codecs import Encoded, Spec, dense, sparse_top
from cl_graft.skillpack.compress import auto_gptq
from cl_graft.skillpack.compress.factorise import Factored, encode, spec_of
from cl_graft.skillpack.compress.policy import Paper, Plan, Profile, sparse_bytes
from cl_graft.skillpack.compress.work import (
    ByteLimit,
    Piece,
    Read,
    Work,
    fetch,
    kept,
    measure,
    put,
    visit,
)
from cl_graft.skillpack.memory import release


def planned(work: Work, policy: Paper) -> dict[str, Spec]:
    """Encode all pieces; results go into the work store. Raises OverBudget."""
    require_solver(policy, work.pieces)
    profiles = _profiles(work)
    specs: dict[str, Spec] = {}
    for piece in work.pieces:
        if piece.kind == "vector":
            specs[piece.name] = kept(work, piece, partial(_whole, piece))
    specs |= _tables(work, policy, profiles, specs)
    matrices = {name: p for name, p in profiles.items() if p.kind == "matrix"}
    return specs | _matrices(work, policy, fitting(policy, matrices, specs, work.limit))


def require_solver(policy: Paper, pieces: Sequence[Piece]) -> None:
    """Raise CLGraftError where the policy's solver is not installed, or not for these matrices."""
    if policy.solver == "auto-gptq":
        auto_gptq.require(p.name for p in pieces if p.kind == "matrix" and p.transposed)


def _profiles(work: Work) -> dict[str, Profile]:
    """What is known of every matrix and table."""
    measure(work, work.directions.found, lambda piece, found, delta, under: None)
    profiles = {}
    for piece in work.pieces:
        if piece.kind != "vector":
            matrix = piece.kind == "matrix"
            shape = piece.shape[::-1] if piece.transposed else piece.shape
            energy = work.directions.energy(piece.name) if matrix else None
            profiles[piece.name] = Profile(piece.kind, piece.role, shape, energy)
    return profiles


def fitting(
    policy: Paper, profiles: Mapping[str, Profile], fixed: Mapping[str, Spec], limit: ByteLimit
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
                about += sparse_bytes(plan.top[name], prod(profile.shape))
        return limit.bytes - limit.cost(specs) - about

    low, high = 0.0, 1.0
    if left(policy.plan(profiles, low)) >= 0:
        return policy.plan(profiles, low)
    if left(policy.plan(profiles, high)) < 0:
        raise OverBudget(
            f"the budget {limit.text} ({limit.bytes} bytes) holds not even what the policy must keep; "
            "raise it, or lower the policy's alpha, beta or rank."
        )
    while high - low > 1e-5:
        middle = (low + high) / 2
        fits = left(policy.plan(profiles, middle)) >= 0
        low, high = (low, middle) if fits else (middle, high)
    return policy.plan(profiles, high)


def _tables(
    work: Work, policy: Paper, profiles: Mapping[str, Profile], fixed: Mapping[str, Spec]
) -> dict[str, Spec]:
    """Embeddings, heads and the like, by magnitude."""
    limit, allowed = work.limit, work.limit.bytes
    while True:
        plan = fitting(policy, profiles, fixed, replace(limit, bytes=allowed))
        specs = {
            piece.name: kept(work, piece, partial(_pruned, piece, plan.top[piece.name]))
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


def _pruned(piece: Piece, count: int) -> Encoded:
    return sparse_top(piece.delta(), count)


def _matrices(work: Work, policy: Paper, plan: Plan) -> dict[str, Spec]:
    total, done = sum(prod(p.shape) for p in work.pieces if p.name in plan.counts) or 1, 0

    def use(reads: list[Read]) -> None:
        nonlocal done
        for pieces, hessian in reads:
            chosen = [p for p in pieces if plan.counts.get(p.name)]
            encoded = _encoded(work, policy, chosen, plan, hessian)
            for piece, made in zip(chosen, encoded, strict=True):
                put(work.store, piece.name, made)
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


def _encoded(
    work: Work, policy: Paper, group: list[Piece], plan: Plan, hessian: Tensor | None
) -> list[Encoded]:
    """Matrices that read the same input, in one solve."""
    under, items = work.under(hessian), []
    for piece in group:
        counts, delta = plan.counts[piece.name], work.delta(piece)
        found = work.directions.take(piece.name, delta, under, sum(counts.values()))
        items.append(Factored(delta, found, counts, piece.transposed))
    options: dict[str, Any] = {
        "group_size": policy.group_size,
        "damping": policy.damping,
        "act_order": policy.act_order,
    }
    if policy.solver == "auto-gptq":
        return auto_gptq.encode(items, hessian, **options)
    return encode(
        items,
        hessian,
        **options,
        aware=policy.activation_aware,
        refit=policy.refit,
    )
