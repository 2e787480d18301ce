"""Where the stored elements of a tensor are: fields `kept` and `gap` of a meta, and the part `index` (packing.py)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.encoded import Encoded, Meta, whole, wholes

Part = tuple[torch.dtype, tuple[int, ...]]


def names(meta: Meta) -> list[str]:
    """The fields that say it: `gap` is absent where a bitmap is shorter."""
    return ["kept", "gap"] if "gap" in meta else ["kept"]


def store(mask: Tensor) -> tuple[Meta, Tensor]:
    """The fields and the index of a mask (bool, of any shape), in the shorter form."""
    flat = mask.detach().cpu().reshape(-1)
    positions = flat.nonzero().reshape(-1)
    gap, index = packing.pack_index(positions, flat.numel())
    meta: Meta = {"kept": positions.numel()}
    return meta | ({"gap": gap} if gap else {}), index


def spec(mask: Tensor) -> Meta:
    """The fields alone, which cost less to find than the index."""
    flat = mask.detach().cpu().reshape(-1)
    positions = flat.nonzero().reshape(-1)
    width, tokens = packing.best_gap(positions, flat.numel())
    shorter = packing.packed_bytes(tokens, width) < packing.packed_bytes(flat.numel(), 1)
    return {"kept": positions.numel()} | ({"gap": [width, tokens]} if shorter else {})


def layout(meta: Meta, numel: int) -> tuple[int, Part]:
    """(kept, what the index is). Raises ValueError on nonsense."""
    kept = whole(meta["kept"], "kept", 0, numel)
    index = packing.packed_bytes(numel, 1)
    if "gap" in meta:
        width, tokens = wholes(meta["gap"], 2, "gap")
        whole(width, "gap width", 1, packing.MAX_WIDTH)
        # each of them goes one place on or more
        whole(tokens, "gap tokens", 0, numel)
        index = packing.packed_bytes(tokens, width)
    return kept, (torch.uint8, (index,))


def load(encoded: Encoded) -> Tensor:
    """The positions, int64 (kept,), strictly increasing. Raises ValueError on an index that does not fit."""
    numel, meta = math.prod(encoded.shape), encoded.meta
    positions = packing.unpack_index(encoded.parts["index"], meta.get("gap"), numel)
    if positions.numel() != meta["kept"]:
        raise ValueError(f"{positions.numel()} positions for {meta['kept']} values.")
    return positions


def least_bits(kept: int, numel: int) -> float:
    """The logarithm of the number of ways to choose them: no index can be shorter on average."""
    ways = math.lgamma(numel + 1) - math.lgamma(kept + 1) - math.lgamma(numel - kept + 1)
    return ways / math.log(2)
