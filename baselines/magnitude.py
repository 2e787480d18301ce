"""Magnitude pruning of each task's delta: the largest entries, as many as the budget holds."""

from cl_graft.strategy import compressor


@compressor(keeps="per_task")
def magnitude(delta, context):
    """Global threshold over all tensors; kept values in bf16, positions as bitmap or gaps."""
    return context.top_magnitude(delta)
