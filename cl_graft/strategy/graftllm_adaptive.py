"""GraftLLM's packs under a policy of our own: one step for all tensors (the idea of arXiv 2505.18502, our engine).

What a task keeps is what `graftllm` keeps, at the same bytes; only how they are shared out differs. Factors and entries
are whole numbers under an entropy coder, as coarse as one price of a byte allows; directions are those of the
layer's inputs, and left factors are fitted again to what rounding made of the right ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cl_graft.errors import OverBudget
from cl_graft.ranges import Count, NotNegative
from cl_graft.skillpack.codecs import CodeLayout, Encoded, Spec
from cl_graft.skillpack.compress.policy import Adaptive
from cl_graft.skillpack.compress.tables import vector_specs
from cl_graft.strategy.context import Context
from cl_graft.strategy.forms import compressor
from cl_graft.strategy.graftllm import own_options, packed, pieces


def check(context: Context, *, layout: CodeLayout, **options: Any) -> None:
    """Refuse a budget that does not hold norms and biases, whatever a task teaches. Raises OverBudget."""
    vectors: dict[str, Spec] = {}
    for piece in pieces(context, {}):
        if piece.kind == "vector":
            ways = vector_specs(piece.shape, layout)
            vectors[piece.name] = min(ways, key=lambda way: context.cost_of({piece.name: way}))
    if context.cost_of(vectors) > context.budget.bytes:
        raise OverBudget(
            f"the budget {context.budget.text} ({context.budget.bytes} bytes) does not hold norms and biases; raise it."
        )


@compressor(keeps="per_task", check=check)
def graftllm_adaptive(
    delta: Mapping[str, Tensor],
    context: Context,
    *,
    damping: NotNegative = 0.03,
    layout: CodeLayout = "small",
    calibration_batches: Count = 8,
) -> dict[str, Encoded]:
    """damping: share of the mean diagonal added to the second moments of inputs. layout: small is entropy-coded, fast
    packed at aligned widths, which merges sooner and holds less. calibration_batches: of the task's text.
    """
    return packed(delta, context, Adaptive(**own_options(Adaptive, locals())), calibration_batches)
