"""Delta-CoMe: singular vectors in bands of falling precision, by GPTQ (Ping et al. 2024, arXiv 2406.08903).

The released script's bands: the first 2 ranks at 8 bits, 32 at 3, the others at 2, in groups of 128 by act-order, with
968 of the others for attention and 1,428 for the MLP of LLaMA-2 7B; here one scale on all ranks is lowered until the
pack fits, the last ones first. `graftllm`, whose code is built on it, splits the ranks by shares, 2 % at 8 bits and
18 % at 4. What differs from the release: V and then U are quantised by our solver, all bands of V in one solve,
and U's groups go down the outputs, not along the ranks (`solver="auto-gptq"` has both as released); calibration is on
the task's text, not C4; embeddings and head, which it keeps whole and does not count, are pruned as `graftllm` does.
"""

from dataclasses import dataclass
from typing import Literal

from cl_graft.ranges import Count, NotNegative
from cl_graft.skillpack.compress.policy import Paper
from cl_graft.strategy import compressor
from cl_graft.strategy.graftllm import own_options, packed, possible

# ranks in all of LLaMA-2 7B's matrices, which have 4,096
WIDTH, ATTENTION, MLP = 4096, 2 + 32 + 968, 2 + 32 + 1428


@dataclass(frozen=True)
class Bands(Paper):
    """Ranks at 8 and at 3 bits of every matrix, and a share of its ranks at 2."""

    int8: int = 2
    int3: int = 32

    def _ranks(self, p, scale):
        full = min(p.shape)
        return min(full, round(4 * scale * full * (MLP if p.role == "mlp" else ATTENTION) / WIDTH))

    def _divided(self, ranks):
        counts = {8: min(self.int8, ranks), 3: min(self.int3, max(0, ranks - self.int8))}
        counts[2] = ranks - sum(counts.values())
        return {bits: count for bits, count in counts.items() if count}


def check(context, **options):
    possible(context, Bands(**own_options(Bands, options)))


@compressor(keeps="per_task", check=check)
def delta_come(
    delta,
    context,
    *,
    int8: Count = 2,
    int3: Count = 32,
    group_size: Count = 128,
    damping: NotNegative = 0.01,
    act_order: bool = True,
    calibration_batches: Count = 8,
    solver: Literal["cl-graft", "auto-gptq"] = "cl-graft",
):
    """int8, int3: ranks of every matrix at 8 and at 3 bits, as far as it has any; those after them are at 2.
    solver: as of `graftllm`.
    """
    return packed(delta, context, Bands(**own_options(Bands, locals())), calibration_batches)
