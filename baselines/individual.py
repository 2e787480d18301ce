"""One fully fine-tuned model per task: the ceiling for methods that store a delta per task."""

from cl_graft.strategy import compressor


@compressor(keeps="per_task", budgeted=False)
def individual(delta, context):
    """Every task is tuned from the base; its whole delta is stored in bf16."""
    return context.dense(delta)
