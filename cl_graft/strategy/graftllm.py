"""GraftLLM: one compressed SkillPack per task, on a base that is never touched (arXiv 2505.18502, ICLR 2026).

Every task is tuned from the base in full; its delta is compressed module by module: embeddings and head pruned by
magnitude, MLP and attention factorised by plain SVD, the factors quantised by GPTQ in a fixed split of precisions, the
first ranks the finest, norms and biases kept. One pack a task is appended, and the pack of the task at hand is the one
that is active. `graftllm_adaptive` is our own policy on the same engine (skillpack/compress/compress.py), which
`cl-graft pack create` runs on two folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor

from cl_graft.budget import largest
from cl_graft.errors import OverBudget
from cl_graft.models.experts import stacked
from cl_graft.models.roles import tied_head
from cl_graft.models.spread import device_of
from cl_graft.ranges import Count, NotNegative, Part, Share
from cl_graft.skillpack.codecs import Encoded, Spec, dense_spec
from cl_graft.skillpack.compress.calibrate import stored_transposed
from cl_graft.skillpack.compress.compress import compress
from cl_graft.skillpack.compress.planned import fitting, require_solver
from cl_graft.skillpack.compress.policy import Paper, Policy, Profile
from cl_graft.skillpack.compress.work import ByteLimit, Piece, fetch
from cl_graft.skillpack.compress.work_store import Item
from cl_graft.strategy.context import Context
from cl_graft.strategy.forms import compressor


def possible(context: Context, policy: Paper) -> None:
    """Refuse a policy of which what it must keep, whatever a task teaches, is over the budget. Raises OverBudget."""
    require_solver(policy, pieces(context, {}))
    if holds(context, policy):
        return
    # the nearest value, in parts of what the option counts in
    for name, parts in (("rank", 1), ("alpha", 1000)):
        most = int((getattr(policy, name) or 0) * parts)
        tried = partial(_tried, context, policy, name, parts)
        if (nearest := largest(tried, 1, most)) > 0:
            raise OverBudget(
                f"{context.header.method}.{name}={getattr(policy, name)} takes more than the budget "
                f"{context.budget.text} allows ({context.budget.bytes} bytes); the largest that fits is "
                f"{nearest / parts:g}."
            )
    raise OverBudget(
        f"the budget {context.budget.text} ({context.budget.bytes} bytes) holds not even what the policy must keep; "
        "raise it, or lower the policy's alpha and rank."
    )


def _tried(context: Context, policy: Paper, name: str, parts: int, count: int) -> bool:
    value: Any = count if parts == 1 else count / parts
    return holds(context, replace(policy, **{name: value}))


def holds(context: Context, policy: Paper) -> bool:
    """Whether the budget holds what the policy keeps of a delta that is worth nothing."""
    fixed: dict[str, Spec] = {}
    profiles: dict[str, Profile] = {}
    for piece in pieces(context, {}):
        if piece.kind == "vector":
            fixed[piece.name] = dense_spec(piece.shape)
            continue
        energy = torch.zeros(min(piece.shape)) if piece.kind == "matrix" else None
        profiles[piece.name] = Profile(piece.kind, piece.role, piece.shape, energy)
    try:
        fitting(policy, profiles, fixed, limit_of(context))
    except OverBudget:
        return False
    return True


def limit_of(context: Context) -> ByteLimit:
    """The context's budget, as the engine takes it."""
    return ByteLimit(context.cost_of, context.budget.bytes, context.budget.text)


def own_options(kind: type[Policy], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that are a policy's own."""
    return {k: v for k, v in options.items() if k in kind.__dataclass_fields__}


def check(context: Context, **options: Any) -> None:
    """Refuse what the paper's policy cannot do."""
    possible(context, Paper(**own_options(Paper, options)))


@compressor(keeps="per_task", check=check)
def graftllm(
    delta: Mapping[str, Tensor],
    context: Context,
    *,
    alpha: Share | None = None,
    beta: Part | None = None,
    rank: Count | None = None,
    group_size: Count = 128,
    damping: NotNegative = 0.01,
    act_order: bool = True,
    activation_aware: bool = False,
    refit: bool = False,
    calibration_batches: Count = 8,
    solver: Literal["cl-graft", "auto-gptq"] = "cl-graft",
) -> dict[str, Encoded]:
    """The paper's policy. alpha: share of embedding and head entries kept. beta: share of the energy that MLP ranks
    keep. rank: most ranks of an attention matrix. The paper gives none of the three: where they are None one scale for
    all is lowered until the pack fits. activation_aware, refit: parts of the adaptive policy, to see what each adds.
    solver: what quantises the factors, ours or the GPTQ class of auto-gptq 0.7.1, which the released code is built on.
    """
    return packed(delta, context, Paper(**own_options(Paper, locals())), calibration_batches)


def packed(
    delta: Mapping[str, Tensor], context: Context, policy: Policy, batches: int
) -> dict[str, Encoded]:
    """The delta compressed to the budget by a policy. batches: of the task's text, to calibrate on."""
    store: dict[str, Item] = {}
    specs = compress(
        pieces(context, delta),
        context.moments(batches),
        policy,
        limit_of(context),
        store,
        device=device_of(context.model),
        progress=lambda what, done: context.progress(done),
    )
    return {name: fetch(store, name) for name in specs}


def pieces(context: Context, delta: Mapping[str, Tensor]) -> list[Piece]:
    """The delta of a model in memory, parameter by parameter of those that are touched."""
    model, roles = context.model, context.roles
    transposed, head, stacks = stored_transposed(model), tied_head(model), stacked(model)
    held = lru_cache(maxsize=1)(delta.__getitem__)  # a stack is read once for all its matrices
    return [
        Piece(
            name,
            shape,
            roles[name],
            partial(delta.__getitem__, name),
            transposed=name in transposed,
            head=head.get(name),
            rows=stacks.get(name) == "vectors",
            matrix=partial(_matrix, held, name) if stacks.get(name) == "matrices" else None,
        )
        for name, shape in context.shapes.items()
    ]


def _matrix(delta: Callable[[str], Tensor], name: str, number: int) -> Tensor:
    return delta(name)[number]
