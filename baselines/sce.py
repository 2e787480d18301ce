"""SCE: select by variance, calculate coefficients, erase minority signs (Wan et al. 2024, FuseChat, arXiv 2408.07990).

Of each parameter, the entries whose variance over the tasks is among the largest are selected; a task's coefficient is
its share of the squares of what is selected; of an entry the values whose sign is not that of the tasks' sum are
erased, and those left are averaged by the coefficients. Nothing is known of other parameters. As in mergekit's `sce` a
sum of zero counts as positive; there the share selected is of the entries that vary at all.
"""

import torch

from cl_graft.ranges import Part
from cl_graft.strategy import merger


@merger
def sce(deltas, *, density: Part = 0.1):
    """density: share of a parameter's entries that are selected; the paper's 10 %.

    It is of all entries, and entries that tie with the last one are selected, too: where the tasks agree everywhere,
    all are. The result has no factor of its own, and no data are looked at. One task alone is itself.
    """
    summed = sum(deltas)
    # the variance, up to a factor: without a division it is 0 where tasks agree
    varies = sum((x * len(deltas) - summed).square_() for x in deltas).flatten()
    rank = max(1, int(density * varies.numel()))
    selected = (varies >= varies.kthvalue(varies.numel() - rank + 1).values).view_as(summed)
    positive = summed >= 0
    total, weight = torch.zeros_like(summed), torch.zeros_like(summed)
    # the share of all squares would divide sum and weight alike
    for x in deltas:
        square = (x * selected).square_().sum(dtype=torch.float64).item()
        agrees = selected & torch.where(positive, x > 0, x < 0)
        total.add_(x * agrees, alpha=square)
        weight.add_(agrees, alpha=square)
    return total / torch.where(weight > 0, weight, 1.0)
