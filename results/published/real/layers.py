"""The whole delta but that of some parameters, put back to the base's: which layers carry a task?"""

from typing import Literal

from cl_graft.models.roles import decoder_layers
from cl_graft.strategy import compressor


@compressor(keeps="per_task", budgeted=False)
def layers(delta, context, *, without: Literal["first", "middle", "last", "rest"] = "first"):
    """without: a third of the decoder's layers, or all that is in no layer: embeddings, head, last norm."""
    place, modules = decoder_layers(context.model)

    def third(name: str) -> str:
        if not name.startswith(f"{place}."):
            return "rest"
        number = int(name.removeprefix(f"{place}.").partition(".")[0])
        return ("first", "middle", "last")[3 * number // len(modules)]

    return context.dense({name: x for name, x in delta.items() if third(name) != without})
