"""Task arithmetic: the tasks' deltas added up, scaled (Ilharco et al. 2023, arXiv 2212.04089)."""

from cl_graft.ranges import Positive
from cl_graft.strategy import merger

GRID = tuple(round(0.05 * n, 2) for n in range(1, 21))


@merger(grid={"scale": GRID})
def task_arithmetic(deltas, *, scale: Positive | None = None):
    """scale: factor on the sum; None chooses it among 0.05, 0.10, ..., 1.00, as the paper does, by the loss on the
    validation data of all tasks seen, anew after each task. One task alone is itself, its scale 1."""
    return scale * sum(deltas)
