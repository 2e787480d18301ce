"""GraftLLM's packs under a policy of our own: one price of a byte for all tensors (the engine of arXiv 2505.18502).

What a task keeps is what `graftllm` keeps, and the bytes are the same; only how they are shared out differs. Every rank
of every matrix chooses between 8, 6, 5, 4, 3, 2 bits and none, every entry of embeddings and head is kept or not, by
what it is worth a byte; directions are those of the layer's inputs, and left factors are fitted again to what
quantisation made of the right ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cl_graft.ranges import Count, NotNegative, Part, Share
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.compress.policy import Adaptive
from cl_graft.strategy.context import Context
from cl_graft.strategy.forms import compressor
from cl_graft.strategy.graftllm import packed, policy_of, possible


def check(context: Context, **options: Any) -> None:
    """Refuse what the adaptive policy cannot do."""
    possible(context, policy_of(Adaptive, options))


@compressor(keeps="per_task", check=check)
def graftllm_adaptive(
    delta: Mapping[str, Tensor],
    context: Context,
    *,
    alpha: Share | None = None,
    beta: Part | None = None,
    rank: Count | None = None,
    group_size: Count = 128,
    damping: NotNegative = 0.01,
    act_order: bool = False,
    activation_aware: bool = True,
    refit: bool = True,
    calibration_batches: Count = 8,
) -> dict[str, Encoded]:
    """alpha, beta, rank: limits as of `graftllm`; None lets the price decide. activation_aware: directions of D L with
    H = L L^T instead of the plain SVD of D. refit: least-squares refit of the left factors.
    """
    return packed(delta, context, policy_of(Adaptive, locals()), calibration_batches)
