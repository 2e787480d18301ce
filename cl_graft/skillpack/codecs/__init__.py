"""Codecs: how one tensor of a delta is stored. One encoder each, and one entry in `CODECS`.

codec: meta; parts
- dense: dtype; values, in the shape of the tensor
- sparse: dtype, kept, gap = [width, tokens] (absent where a bitmap is shorter); values, index
- low_rank: dtype, rank; left (out, rank), right (rank, in)
- quantized: bits, group_size; codes, scales
- quantized_low_rank: groups = [[rank, bits, left group size, right group size], ...]; codes, scales
- sign_scale: nothing; signs, scale (1,)

index, codes and signs are bit-packed uint8 (packing.py), scales float16; dtype is BF16, F16 or F32.
The parts follow from codec, shape and meta alone (`layout`): sizes are known before the data are,
and a reader can refuse a file before it allocates anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.encoded import (
    DTYPES,
    MAX_DIMS,
    MAX_ELEMENTS,
    Encoded,
    Layout,
    Meta,
    Spec,
    check_shape,
    dtype_name,
    dtype_of,
    fields,
    finite,
    matrix,
    part_bytes,
    rounded,
    whole,
    wholes,
)
from cl_graft.skillpack.codecs.quantized import (
    check_grids,
    decode_factors,
    decode_matrix,
    factor_grids,
    layout_of,
    matrix_grids,
    quantized,
    quantized_low_rank,
)

__all__ = [
    "CODECS",
    "DTYPES",
    "MAX_DIMS",
    "MAX_ELEMENTS",
    "Codec",
    "Encoded",
    "Layout",
    "Meta",
    "Spec",
    "check",
    "check_shape",
    "decode",
    "dense",
    "finite",
    "layout",
    "low_rank",
    "part_bytes",
    "payload_bytes",
    "quantized",
    "quantized_low_rank",
    "sign_scale",
    "sparse",
    "sparse_top",
]


class Codec(NamedTuple):
    """decode: parts -> float32. layout: (shape, meta) -> parts. check: what a layout cannot say."""

    decode: Callable[[Encoded], Tensor]
    layout: Callable[[tuple[int, ...], Meta], Layout]
    check: Callable[[Encoded], object] = lambda encoded: None


def layout(codec: str, shape: tuple[int, ...], meta: Meta) -> Layout:
    """{part: (dtype, shape)}, exactly the parts that must be there; ValueError on nonsense."""
    if codec not in CODECS:
        raise ValueError(f"there is no codec named {codec!r} (known: {', '.join(CODECS)}).")
    check_shape(shape)
    return CODECS[codec].layout(shape, meta)


def payload_bytes(codec: str, shape: tuple[int, ...], meta: Meta) -> int:
    """Bytes of all parts, without the file's header. Raises ValueError as `layout` does."""
    return sum(part_bytes(*part) for part in layout(codec, shape, meta).values())


def check(encoded: Encoded) -> None:
    """Raise ValueError unless the parts are what `layout` asks for, with no bit out of place."""
    check_parts(encoded)
    CODECS[encoded.codec].check(encoded)


def check_parts(encoded: Encoded) -> None:
    """Raise ValueError unless the parts have the dtypes and shapes that `layout` asks for."""
    wanted = layout(*encoded.spec)
    found = {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()}
    if found != wanted:
        raise ValueError(f"codec {encoded.codec} needs the parts {wanted}, not {found}.")


def decode(encoded: Encoded) -> Tensor:
    """The delta, float32, of `encoded.shape`, on the CPU. Raises ValueError as `check` does."""
    check(encoded)
    if not math.prod(encoded.shape):  # whose other size may be beyond any memory
        return torch.zeros(encoded.shape)
    return CODECS[encoded.codec].decode(encoded)


# dense


def dense(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """Every element of x (any shape) in `dtype`. Raises ValueError on NaN, Inf or overflow."""
    values = rounded(x, dtype, "the tensor")
    return Encoded("dense", tuple(x.shape), {"dtype": dtype_name(dtype)}, {"values": values})


def _dense_layout(shape: tuple[int, ...], meta: Meta) -> Layout:
    fields(meta, "dtype")
    return {"values": (dtype_of(meta), shape)}


def _dense_decode(encoded: Encoded) -> Tensor:
    return encoded.parts["values"].to(torch.float32, copy=True)


# sparse


def sparse(x: Tensor, mask: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """The elements where `mask` (bool, the shape of x) is true; the index form is the shorter one.

    x: any shape. Raises ValueError on a mask of another shape or dtype, on NaN, Inf or overflow.
    """
    if mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(f"a mask for shape {tuple(x.shape)} is bool and of that shape.")
    flat = mask.detach().cpu().reshape(-1)
    positions = flat.nonzero().reshape(-1)
    values = rounded(x.detach().cpu().reshape(-1)[positions], dtype, "the tensor")
    gap, index = packing.pack_index(positions, flat.numel())
    meta: Meta = {"dtype": dtype_name(dtype), "kept": positions.numel()}
    meta |= {"gap": gap} if gap else {}
    return Encoded("sparse", tuple(x.shape), meta, {"values": values, "index": index})


def sparse_top(x: Tensor, keep: int, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """The `keep` elements of largest magnitude; of equal ones, the first in row-major order.

    Raises ValueError as `sparse` does, and for a `keep` beyond the number of elements.
    """
    if not 0 <= keep <= x.numel():
        raise ValueError(f"cannot keep {keep} of {x.numel()} elements.")
    if not torch.isfinite(x).all():  # what compares with NaN would be left out in silence
        raise ValueError("the tensor holds NaN or Inf: there is nothing to store.")
    magnitude = x.detach().cpu().reshape(-1).abs()
    least = magnitude.kthvalue(x.numel() - keep + 1).values if keep else math.inf
    mask = magnitude > least
    ties = (magnitude == least).nonzero().reshape(-1)
    mask[ties[: keep - int(mask.sum())]] = True
    return sparse(x, mask.reshape(x.shape), dtype)


def _sparse_layout(shape: tuple[int, ...], meta: Meta) -> Layout:
    fields(meta, "dtype", "kept", *(["gap"] if "gap" in meta else []))
    numel = math.prod(shape)
    kept = whole(meta["kept"], "kept", 0, numel)
    index = packing.packed_bytes(numel, 1)
    if "gap" in meta:
        width, tokens = wholes(meta["gap"], 2, "gap")
        whole(width, "gap width", 1, packing.MAX_WIDTH)
        whole(tokens, "gap tokens", 0, numel)  # each of them goes one place on or more
        index = packing.packed_bytes(tokens, width)
    return {"values": (dtype_of(meta), (kept,)), "index": (torch.uint8, (index,))}


def sparse_positions(encoded: Encoded) -> Tensor:
    """int64 (kept,), strictly increasing; ValueError where the index says anything else."""
    numel = math.prod(encoded.shape)
    positions = packing.unpack_index(encoded.parts["index"], encoded.meta.get("gap"), numel)
    if positions.numel() != encoded.meta["kept"]:
        raise ValueError(f"{positions.numel()} positions for {encoded.meta['kept']} values.")
    return positions


def _sparse_decode(encoded: Encoded) -> Tensor:
    positions = sparse_positions(encoded)
    x = torch.zeros(math.prod(encoded.shape))
    x[positions] = encoded.parts["values"].float()
    return x.reshape(encoded.shape)


# low_rank


def low_rank(left: Tensor, right: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """delta = left @ right. left: (out, r), right: (r, in). Raises ValueError as `dense` does."""
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors {tuple(left.shape)} and {tuple(right.shape)} have no product.")
    parts = {
        "left": rounded(left, dtype, "the left factor"),
        "right": rounded(right, dtype, "the right factor"),
    }
    shape, meta = (
        (left.shape[0], right.shape[1]),
        {"dtype": dtype_name(dtype), "rank": left.shape[1]},
    )
    return Encoded("low_rank", shape, meta, parts)


def _low_rank_layout(shape: tuple[int, ...], meta: Meta) -> Layout:
    fields(meta, "dtype", "rank")
    rows, cols = matrix(shape)
    dtype, rank = dtype_of(meta), whole(meta["rank"], "rank", 0)
    return {"left": (dtype, (rows, rank)), "right": (dtype, (rank, cols))}


def _low_rank_decode(encoded: Encoded) -> Tensor:
    return encoded.parts["left"].float() @ encoded.parts["right"].float()


# sign_scale


def sign_scale(x: Tensor, scale: float | None = None) -> Encoded:
    """scale * sign(x), with zeros counted as negative (BitDelta, Liu et al. 2024).

    x: any shape. scale: by default the mean magnitude, which minimises the squared error.
    Raises ValueError on NaN, Inf, or a scale beyond float32.
    """
    x = rounded(x, torch.float32, "the tensor")
    if scale is None:
        scale = float(x.abs().double().mean()) if x.numel() else 0.0
    one = rounded(torch.tensor([scale], dtype=torch.float64), torch.float32, "the scale")
    parts = {"signs": packing.pack((x > 0).to(torch.uint8), 1), "scale": one}
    return Encoded("sign_scale", tuple(x.shape), {}, parts)


def _sign_scale_layout(shape: tuple[int, ...], meta: Meta) -> Layout:
    fields(meta)
    size = packing.packed_bytes(math.prod(shape), 1)
    return {"signs": (torch.uint8, (size,)), "scale": (torch.float32, (1,))}


def _sign_scale_check(encoded: Encoded) -> None:
    packing.check_packed(encoded.parts["signs"], math.prod(encoded.shape), 1)


def _sign_scale_decode(encoded: Encoded) -> Tensor:
    signs = packing.unpack(encoded.parts["signs"], math.prod(encoded.shape), 1).bool()
    scale = encoded.parts["scale"]
    return torch.where(signs, scale, -scale).reshape(encoded.shape)


CODECS: dict[str, Codec] = {
    "dense": Codec(_dense_decode, _dense_layout),
    "sparse": Codec(_sparse_decode, _sparse_layout, sparse_positions),
    "low_rank": Codec(_low_rank_decode, _low_rank_layout),
    "quantized": Codec(
        decode_matrix, partial(layout_of, matrix_grids), partial(check_grids, matrix_grids)
    ),
    "quantized_low_rank": Codec(
        decode_factors, partial(layout_of, factor_grids), partial(check_grids, factor_grids)
    ),
    "sign_scale": Codec(_sign_scale_decode, _sign_scale_layout, _sign_scale_check),
}
