"""ComPEFT: the largest entries become their sign times one scale for all (Yadav et al. 2023, arXiv 2311.13171).

The top k % of the whole delta by magnitude are kept as alpha * std(delta) * sign, k and alpha chosen on validation.
The paper tries k in 5, 10, 20, 30, 50 and alpha in 0.5, 1, 2, 3, 4, 5, 6, 8, 10 in all pairs by the task's score; here
alpha is chosen at the largest k that fits, then k at that alpha, by the loss. It stores positions by Golomb's code;
here they are a bitmap or gaps, whichever is shorter.
"""

import torch

from cl_graft.budget import largest_share
from cl_graft.ranges import Part, Positive
from cl_graft.skillpack.codecs import sparse_codebook, sparse_codebook_spec
from cl_graft.strategy import compressor
from cl_graft.strategy.choose import kept_loss

DENSITIES = (0.05, 0.1, 0.2, 0.3, 0.5)
ALPHAS = (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)


@compressor(keeps="per_task")
def compeft(delta, context, *, density: Part | None = None, alpha: Positive | None = None):
    """density: share of the entries that is kept; None chooses among those of the paper that the budget holds, and the
    largest that it does. alpha: factor on the delta's standard deviation; None chooses it.
    """
    ternary = Ternary(delta)

    def cost(count):
        specs = {n: sparse_codebook_spec(m, 1) for n, m in ternary.masks(count).items()}
        return context.cost_of(specs)

    total = len(ternary.order)
    one = "one sign and its position"
    most = largest_share(context.budget, cost, total, one, density, "compeft.density")
    tried = DENSITIES if density is None else ()
    counts = [*(n for d in tried if 1 <= (n := int(d * total)) < most), most]

    def lost(count, alpha):
        return kept_loss(context, ternary.encoded(count, alpha))

    alphas = ALPHAS if alpha is None else (alpha,)
    if len(alphas) > 1:
        alpha = min(alphas, key=lambda each: lost(counts[-1], each))
    if len(counts) > 1:
        counts = [min(counts, key=lambda count: lost(count, alpha))]
    return ternary.encoded(counts[0], alpha)


class Ternary:
    """A delta's entries by falling magnitude, over all tensors together. delta: {parameter: float32 tensor}."""

    def __init__(self, delta):
        self.delta = dict(delta.items())
        flat = torch.cat([x.flatten() for x in self.delta.values()])
        self.order = flat.abs().argsort(descending=True, stable=True)
        self.deviation = float(flat.double().std())

    def masks(self, count):
        """{parameter: where the `count` largest entries are}; a tensor with none is left out."""
        picked = torch.zeros(len(self.order), dtype=torch.bool)
        picked[self.order[:count].cpu()] = True
        parts = picked.split([x.numel() for x in self.delta.values()])
        named = zip(self.delta.items(), parts, strict=True)
        return {name: part.view(x.shape) for (name, x), part in named if part.any()}

    def encoded(self, count, alpha):
        """{parameter: the entries kept, encoded}."""
        scale = alpha * self.deviation
        levels = torch.tensor([-scale, scale])
        return {
            name: sparse_codebook((self.delta[name] > 0).byte().cpu(), mask, levels)
            for name, mask in self.masks(count).items()
        }
