"""Task arithmetic: the tasks' deltas added up, scaled (Ilharco et al. 2023, arXiv 2212.04089)."""

from cl_graft.strategy import merger


@merger
def task_arithmetic(deltas, *, scale: float = 0.4):
    """scale: factor on the sum; the paper tunes it between 0 and 1 on validation data."""
    return scale * sum(deltas)
