"""GraftLLM: one compressed SkillPack per task, on a base that is never touched (arXiv 2505.18502, ICLR 2026).

Every task is tuned from the base in full; its delta is compressed module by module: embeddings and head
pruned, MLP and attention factorised by SVD, the factors quantised by GPTQ at a precision that follows the
singular values, norms and biases kept. One pack a task is appended, and the pack of the task at hand is the
one that is active. The engine is skillpack/compress/compress.py; `cl-graft pack create` runs the same on two folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial

from torch import Tensor, nn

from cl_graft.errors import UnknownName
from cl_graft.models.roles import tied_head
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.compress.calibrate import stored_transposed
from cl_graft.skillpack.compress.compress import ByteLimit, Piece, compress, fetch
from cl_graft.skillpack.compress.policy import METHODS
from cl_graft.skillpack.compress.work_store import Item
from cl_graft.strategy.context import Context
from cl_graft.strategy.forms import compressor


@compressor(keeps="per_task")
def graftllm(
    delta: Mapping[str, Tensor],
    context: Context,
    *,
    policy: str = "graftllm-adaptive",
    alpha: float | None = None,
    beta: float | None = None,
    rank: int | None = None,
    group_size: int | None = None,
    damping: float | None = None,
    act_order: bool | None = None,
    activation_aware: bool | None = None,
    refit: bool | None = None,
    calibration_batches: int = 8,
) -> dict[str, Encoded]:
    """policy: graftllm-adaptive shares one budget over all ranks and entries; graftllm is the paper's fixed split.
    alpha: share of embedding and head entries kept. beta: share of the energy that MLP ranks keep. rank: most ranks
    of an attention matrix. activation_aware: directions of D L with H = L L^T instead of the plain SVD of D.
    refit: least-squares refit of the left factors. None is the policy's own default (skillpack/compress/policy.py).
    """
    if policy not in METHODS:
        raise UnknownName("policy", policy, METHODS)
    given = {name: value for name, value in locals().items() if value is not None}
    options = {f.name: given[f.name] for f in fields(METHODS[policy]) if f.name in given}
    store: dict[str, Item] = {}
    specs = compress(
        pieces(context.model, delta, context.roles),
        context.moments(calibration_batches),
        METHODS[policy](**options),
        ByteLimit(context.cost_of, context.budget.bytes, context.budget.text),
        store,
        device=context.model.device,
        progress=lambda what, done: context.progress(done),
    )
    return {name: fetch(store, name) for name in specs}


def pieces(model: nn.Module, delta: Mapping[str, Tensor], roles: Mapping[str, str]) -> list[Piece]:
    """The delta of a model in memory, parameter by parameter."""
    transposed, head = stored_transposed(model), tied_head(model)
    return [
        Piece(
            name,
            tuple(parameter.shape),
            roles[name],
            partial(delta.__getitem__, name),
            transposed=name in transposed,
            head=head.get(name),
        )
        for name, parameter in model.named_parameters()
    ]
