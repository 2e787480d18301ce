"""GraftLLM: one compressed SkillPack per task, on a base that is never touched (arXiv 2505.18502, ICLR 2026).

Every task is tuned from the base in full; its delta is compressed module by module: embeddings and head pruned by
magnitude, MLP and attention factorised by plain SVD, the factors quantised by GPTQ in a fixed split of precisions, the
first ranks the finest, norms and biases kept. One pack a task is appended, and the pack of the task at hand is the one
that is active. `graftllm_adaptive` is our own policy on the same engine (skillpack/compress/compress.py), which
`cl-graft pack create` runs on two folders.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from cl_graft.models.roles import tied_head
from cl_graft.ranges import Count, NotNegative, Part, Share
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.compress.calibrate import stored_transposed
from cl_graft.skillpack.compress.compress import ByteLimit, Piece, compress, fetch
from cl_graft.skillpack.compress.policy import Paper, Policy
from cl_graft.skillpack.compress.work_store import Item
from cl_graft.strategy.context import Context
from cl_graft.strategy.forms import compressor


@compressor(keeps="per_task")
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
) -> dict[str, Encoded]:
    """The paper's policy. alpha: share of embedding and head entries kept. beta: share of the energy that MLP ranks
    keep. rank: most ranks of an attention matrix. The paper gives none of the three: where they are None one scale for
    all is lowered until the pack fits. activation_aware, refit: parts of the adaptive policy, to see what each adds.
    """
    options = {k: v for k, v in locals().items() if k in Paper.__dataclass_fields__}
    return packed(delta, context, Paper(**options), calibration_batches)


def packed(
    delta: Mapping[str, Tensor], context: Context, policy: Policy, batches: int
) -> dict[str, Encoded]:
    """The delta compressed to the budget by a policy. batches: of the task's text, to calibrate on."""
    store: dict[str, Item] = {}
    specs = compress(
        pieces(context.model, delta, context.roles),
        context.moments(batches),
        policy,
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
