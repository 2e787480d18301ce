"""Plain full fine-tuning, task after task: the reference for forgetting."""

from cl_graft.strategy import compressor


@compressor(keeps="latest", budgeted=False)
def sequential(delta, context):
    """The newest weights replace the old ones; their whole delta to the base is stored in bf16."""
    return context.dense(delta)
