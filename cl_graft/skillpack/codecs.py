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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack import packing
from cl_graft.skillpack.packing import Grid
from cl_graft.skillpack.quant import BITS, Quantized

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_DIMS = 8
MAX_ELEMENTS = 1 << packing.MAX_WIDTH

Meta = dict[str, Any]
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
Spec = tuple[str, tuple[int, ...], Meta]


@dataclass(frozen=True, eq=False)
class Encoded:
    """One tensor of a delta as a codec stores it.

    shape: of the decoded tensor; meta: small, plain JSON; parts: {name: tensor on the CPU}.
    """

    codec: str
    shape: tuple[int, ...]
    meta: Meta
    parts: dict[str, Tensor]

    @property
    def spec(self) -> Spec:
        """What the header says of this tensor; enough to tell every part's dtype and shape."""
        return self.codec, self.shape, self.meta


class Codec(NamedTuple):
    """decode: parts -> float32. layout: (shape, meta) -> parts. check: what a layout cannot say."""

    decode: Callable[[Encoded], Tensor]
    layout: Callable[[tuple[int, ...], Meta], Layout]
    check: Callable[[Encoded], object] = lambda encoded: None


def layout(codec: str, shape: tuple[int, ...], meta: Meta) -> Layout:
    """{part: (dtype, shape)}, exactly the parts that must be there; ValueError on nonsense."""
    if codec not in CODECS:
        raise ValueError(f"there is no codec named {codec!r} (known: {', '.join(CODECS)}).")
    if len(shape) > MAX_DIMS or math.prod(_int(size, "a size", 0) for size in shape) > MAX_ELEMENTS:
        raise ValueError(
            f"shape {shape} has over {MAX_DIMS} sizes or 2**{packing.MAX_WIDTH} elements."
        )
    return CODECS[codec].layout(shape, meta)


def part_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of one part."""
    return math.prod(shape) * dtype.itemsize


def payload_bytes(codec: str, shape: tuple[int, ...], meta: Meta) -> int:
    """Bytes of all parts, without the file's header. Raises ValueError as `layout` does."""
    return sum(part_bytes(*part) for part in layout(codec, shape, meta).values())


def finite(encoded: Encoded) -> bool:
    """Whether no value and no scale is NaN or infinite."""
    floats = (part for part in encoded.parts.values() if part.is_floating_point())
    return all(bool(torch.isfinite(part).all()) for part in floats)


def check(encoded: Encoded) -> None:
    """Raise ValueError unless the parts are what `layout` asks for, with no bit out of place."""
    wanted = layout(*encoded.spec)
    found = {name: (part.dtype, tuple(part.shape)) for name, part in encoded.parts.items()}
    if found != wanted:
        raise ValueError(f"codec {encoded.codec} needs the parts {wanted}, not {found}.")
    CODECS[encoded.codec].check(encoded)


def decode(encoded: Encoded) -> Tensor:
    """The delta, float32, of `encoded.shape`, on the CPU. Raises ValueError as `check` does."""
    check(encoded)
    return CODECS[encoded.codec].decode(encoded)


# dense


def dense(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """Every element of x (any shape) in `dtype`. Raises ValueError on NaN, Inf or overflow."""
    values = _rounded(x, dtype, "the tensor")
    return Encoded("dense", tuple(x.shape), {"dtype": _name(dtype)}, {"values": values})


def _dense_layout(shape: tuple[int, ...], meta: Meta) -> Layout:
    _fields(meta, "dtype")
    return {"values": (_dtype(meta), shape)}


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
    values = _rounded(x.detach().cpu().reshape(-1)[positions], dtype, "the tensor")
    gap, index = packing.pack_index(positions, flat.numel())
    meta: Meta = {"dtype": _name(dtype), "kept": positions.numel()}
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
    _fields(meta, "dtype", "kept", *(["gap"] if "gap" in meta else []))
    numel = math.prod(shape)
    kept = _int(meta["kept"], "kept", 0, numel)
    index = packing.packed_bytes(numel, 1)
    if "gap" in meta:
        width, tokens = _ints(meta["gap"], 2, "gap")
        _int(width, "gap width", 1, packing.MAX_WIDTH)
        index = packing.packed_bytes(tokens, width)
    return {"values": (_dtype(meta), (kept,)), "index": (torch.uint8, (index,))}


def _sparse_positions(encoded: Encoded) -> Tensor:
    """int64 (kept,), strictly increasing; ValueError where the index says anything else."""
    numel = math.prod(encoded.shape)
    positions = packing.unpack_index(encoded.parts["index"], encoded.meta.get("gap"), numel)
    if positions.numel() != encoded.meta["kept"]:
        raise ValueError(f"{positions.numel()} positions for {encoded.meta['kept']} values.")
    return positions


def _sparse_decode(encoded: Encoded) -> Tensor:
    positions = _sparse_positions(encoded)
    x = torch.zeros(math.prod(encoded.shape))
    x[positions] = encoded.parts["values"].float()
    return x.reshape(encoded.shape)


# low_rank


def low_rank(left: Tensor, right: Tensor, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """delta = left @ right. left: (out, r), right: (r, in). Raises ValueError as `dense` does."""
    if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
        raise ValueError(f"factors {tuple(left.shape)} and {tuple(right.shape)} have no product.")
    parts = {
        "left": _rounded(left, dtype, "the left factor"),
        "right": _rounded(right, dtype, "the right factor"),
    }
    shape, meta = (left.shape[0], right.shape[1]), {"dtype": _name(dtype), "rank": left.shape[1]}
    return Encoded("low_rank", shape, meta, parts)


def _low_rank_layout(shape: tuple[int, ...], meta: Meta) -> Layout:
    _fields(meta, "dtype", "rank")
    rows, cols = _matrix(shape)
    dtype, rank = _dtype(meta), _int(meta["rank"], "rank", 0)
    return {"left": (dtype, (rows, rank)), "right": (dtype, (rank, cols))}


def _low_rank_decode(encoded: Encoded) -> Tensor:
    return encoded.parts["left"].float() @ encoded.parts["right"].float()


# quantized and quantized_low_rank


def quantized(q: Quantized) -> Encoded:
    """One group-quantised matrix (out, in), codes and zeros packed at `q.bits` bits."""
    meta = {"bits": q.bits, "group_size": q.group_size}
    return Encoded("quantized", _matrix(tuple(q.codes.shape)), meta, _pack_grids([q]))


def quantized_low_rank(
    pairs: Sequence[tuple[Quantized, Quantized]], shape: tuple[int, int]
) -> Encoded:
    """delta = sum_k left_k.T @ right_k, the rank group of the highest precision first.

    pairs: left_k (r_k, out) and right_k (r_k, in), both of the same bits; groups run along out and
    in. shape: (out, in). Raises ValueError where shapes, bits or codes do not fit together.
    """
    groups = []
    for pair in pairs:
        left, right = (packing.grid_of(factor) for factor in pair)
        if (left.rows, left.cols, right.cols) != (right.rows, *shape):
            found = f"({left.rows}, {left.cols}) and ({right.rows}, {right.cols})"
            raise ValueError(f"factors {found} are not (r, out) and (r, in) of shape {shape}.")
        if left.bits != right.bits:
            raise ValueError(f"a rank group has {left.bits} bits left, but {right.bits} right.")
        groups.append([left.rows, left.bits, left.group_size, right.group_size])
    parts = _pack_grids([factor for pair in pairs for factor in pair])
    return Encoded("quantized_low_rank", tuple(shape), {"groups": groups}, parts)


def _quantized_grids(shape: tuple[int, ...], meta: Meta) -> list[Grid]:
    _fields(meta, "bits", "group_size")
    return [_grid(*_matrix(shape), meta["bits"], meta["group_size"])]


def _factor_grids(shape: tuple[int, ...], meta: Meta) -> list[Grid]:
    """Left and right of each rank group, in turn."""
    _fields(meta, "groups")
    rows, cols = _matrix(shape)
    if not isinstance(meta["groups"], list):
        raise ValueError("groups is not a list.")
    grids = []
    for group in meta["groups"]:
        rank, bits, left_size, right_size = _ints(group, 4, "a rank group")
        grids += [_grid(rank, rows, bits, left_size), _grid(rank, cols, bits, right_size)]
    return grids


def _grid(rows: int, cols: int, bits: object, group_size: object) -> Grid:
    bits = _int(bits, "bits", 0)
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, not one of {BITS}.")
    return Grid(rows, cols, bits, _int(group_size, "a group size", 1))


def _grids_layout(grids: list[Grid]) -> Layout:
    codes, scales = sum(grid.bytes for grid in grids), sum(grid.scales for grid in grids)
    return {"codes": (torch.uint8, (codes,)), "scales": (torch.float16, (scales,))}


def _pack_grids(matrices: list[Quantized]) -> dict[str, Tensor]:
    codes = [packing.pack_quantized(q) for q in matrices]
    scales = [_rounded(q.scale, torch.float16, "a scale").reshape(-1) for q in matrices]
    return {
        "codes": torch.cat([torch.empty(0, dtype=torch.uint8), *codes]),
        "scales": torch.cat([torch.empty(0, dtype=torch.float16), *scales]),
    }


def _check_grids(encoded: Encoded, grids: list[Grid]) -> None:
    codes = encoded.parts["codes"].split([grid.bytes for grid in grids])
    for packed, grid in zip(codes, grids, strict=True):
        packing.check_quantized(packed, grid)


def _dequantized(encoded: Encoded, grids: list[Grid]) -> list[Tensor]:
    codes = encoded.parts["codes"].split([grid.bytes for grid in grids])
    scales = encoded.parts["scales"].split([grid.scales for grid in grids])
    parts = zip(codes, scales, grids, strict=True)
    return [packing.unpack_quantized(*part).dequantize() for part in parts]


def _factors_decode(encoded: Encoded) -> Tensor:
    matrices = _dequantized(encoded, _factor_grids(encoded.shape, encoded.meta))
    delta = torch.zeros(encoded.shape)
    for left, right in zip(matrices[::2], matrices[1::2], strict=True):
        delta += left.T @ right
    return delta


# sign_scale


def sign_scale(x: Tensor, scale: float | None = None) -> Encoded:
    """scale * sign(x), with zeros counted as negative (BitDelta, Liu et al. 2024).

    x: any shape. scale: by default the mean magnitude, which minimises the squared error.
    Raises ValueError on NaN, Inf, or a scale beyond float32.
    """
    x = _rounded(x, torch.float32, "the tensor")
    if scale is None:
        scale = float(x.abs().double().mean()) if x.numel() else 0.0
    one = _rounded(torch.tensor([scale], dtype=torch.float64), torch.float32, "the scale")
    parts = {"signs": packing.pack((x > 0).to(torch.uint8), 1), "scale": one}
    return Encoded("sign_scale", tuple(x.shape), {}, parts)


def _sign_scale_layout(shape: tuple[int, ...], meta: Meta) -> Layout:
    _fields(meta)
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
    "sparse": Codec(_sparse_decode, _sparse_layout, _sparse_positions),
    "low_rank": Codec(_low_rank_decode, _low_rank_layout),
    "quantized": Codec(
        lambda encoded: _dequantized(encoded, _quantized_grids(encoded.shape, encoded.meta))[0],
        lambda shape, meta: _grids_layout(_quantized_grids(shape, meta)),
        lambda encoded: _check_grids(encoded, _quantized_grids(encoded.shape, encoded.meta)),
    ),
    "quantized_low_rank": Codec(
        _factors_decode,
        lambda shape, meta: _grids_layout(_factor_grids(shape, meta)),
        lambda encoded: _check_grids(encoded, _factor_grids(encoded.shape, encoded.meta)),
    ),
    "sign_scale": Codec(_sign_scale_decode, _sign_scale_layout, _sign_scale_check),
}


# what a header may say


def _int(value: object, what: str, low: int, high: int = MAX_ELEMENTS) -> int:
    if type(value) is not int or not low <= value <= high:  # True is no number here
        raise ValueError(f"{what}: {value!r} is not a whole number from {low} to {high}.")
    return value


def _ints(value: object, count: int, what: str) -> list[int]:
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{what}: {value!r} is not a list of {count} numbers.")
    return [_int(item, what, 0) for item in value]


def _fields(meta: Meta, *names: str) -> None:
    if set(meta) != set(names):
        raise ValueError(f"meta has the fields {sorted(meta)}, not {sorted(names)}.")


def _dtype(meta: Meta) -> torch.dtype:
    if not isinstance(meta["dtype"], str) or meta["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {meta['dtype']!r}, not one of {', '.join(DTYPES)}.")
    return DTYPES[meta["dtype"]]


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    if len(shape) != 2:
        raise ValueError(f"shape {shape} is not that of a matrix.")
    return shape[0], shape[1]


def _name(dtype: torch.dtype) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    if dtype not in names:
        raise ValueError(f"{dtype} is not one of {', '.join(map(str, names))}.")
    return names[dtype]


def _rounded(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """x in `dtype`, contiguous, on the CPU, and finite."""
    rounded = x.detach().to("cpu", dtype, copy=True).contiguous()
    if not torch.isfinite(rounded).all():
        if torch.isfinite(x).all():
            raise ValueError(f"{what} overflows {_name(dtype)}: store it in a wider dtype.")
        raise ValueError(f"{what} holds NaN or Inf: there is nothing to store.")
    return rounded
