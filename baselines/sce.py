"""SCE: select by variance, calculate coefficients, erase minority signs (Wan et al. 2024, FuseChat, arXiv 2408.07990).

Of each parameter, the entries whose variance over the tasks is among the largest are selected; a task's coefficient is
its share of the squares of what is selected; of an entry the values whose sign is not that of the tasks' sum are
erased, and those left are averaged by the coefficients. Nothing is known of other parameters. As in mergekit's `sce` a
sum of zero counts as positive; there the share selected is of the entries that vary at all.
"""

from typing import Annotated

import torch

from cl_graft.ranges import Part, Strength
from cl_graft.strategy import merger

# entries at a time, of which several copies are held
PART = 1 << 20


@merger
def sce(deltas, *, density: Annotated[Part, Strength(0.02, 0.05, 0.1, 0.2, 0.5)] = 0.1):
    """density: share of a parameter's entries that are selected; the paper's 10 %.

    It is of all entries, and entries that tie with the last one are selected, too: where the tasks agree everywhere,
    all are. The result has no factor of its own, and no data are looked at. One task alone is itself.
    """
    merged = torch.empty_like(deltas[0])

    def parts():
        return zip(*(x.view(-1).split(PART) for x in (merged, *deltas)), strict=True)

    for to, *some in parts():
        # the variance, up to a factor: without a division it is 0 where tasks agree
        summed = sum(some)
        to.copy_(sum((x * len(some) - summed).square_() for x in some))
    rank = max(1, int(density * merged.numel()))
    least = merged.view(-1).kthvalue(merged.numel() - rank + 1).values
    # the share of all squares would divide sum and weight alike
    squares = torch.zeros(len(deltas), dtype=torch.float64)
    for varies, *some in parts():
        squares += (torch.stack(some).double() * (varies >= least)).square_().sum(1)
    for to, *some in parts():
        chosen = torch.stack(some) * (to >= least)
        agrees = torch.where(chosen.sum(0) >= 0, chosen > 0, chosen < 0)
        weights = agrees * squares.view(-1, 1)
        weight = weights.sum(0)
        to.copy_((weights * chosen).sum(0) / torch.where(weight > 0, weight, 1.0))
    return merged
