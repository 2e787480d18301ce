"""An encoded tensor, and what a header may say of it: shared by all codecs.

The checks raise ValueError in one sentence. What they quote is cut short, for a hostile header may
be megabytes long.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing

# dtypes of a delta's values
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# dtypes of parts, in their order in a file: that of safetensors, wide ones first
STORABLE = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U8": torch.uint8,
}
MAX_DIMS = 8
MAX_ELEMENTS = 1 << packing.MAX_WIDTH

Dtypes = Mapping[str, torch.dtype]
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


def part_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of one part."""
    return math.prod(shape) * dtype.itemsize


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; no copy of a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # one element is contiguous in any stride, to torch
    return flat.view(torch.uint8).numpy().data


def finite(encoded: Encoded) -> bool:
    """Whether no value and no scale is NaN or infinite."""
    floats = (part for part in encoded.parts.values() if part.is_floating_point())
    return all(bool(torch.isfinite(part).all()) for part in floats)


def check_shape(shape: tuple[int, ...]) -> None:
    """Raise ValueError unless it is that of a tensor of at most 8 sizes and 2**48 elements.

    An empty shape counts its other sizes too: no stride of such a tensor may overflow.
    """
    dims = len(shape)
    if dims > MAX_DIMS or math.prod(max(1, whole(n, "a size", 0)) for n in shape) > MAX_ELEMENTS:
        limits = f"over {MAX_DIMS} sizes or 2**{packing.MAX_WIDTH} elements"
        raise ValueError(f"shape {short(shape)} has {limits}.")


def whole(value: object, what: str, low: int, high: int = MAX_ELEMENTS) -> int:
    """`value`, a whole number from low to high; True is no number here."""
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{what}: {short(value)} is not a whole number from {low} to {high}.")
    return value


def wholes(value: object, count: int, what: str) -> list[int]:
    """`value`, a list of that many whole numbers, none negative."""
    if not isinstance(value, list) or len(value) != count:
        raise ValueError(f"{what}: {short(value)} is not a list of {count} numbers.")
    return [whole(item, what, 0) for item in value]


def fields(meta: Meta, *names: str) -> None:
    """Raise ValueError unless meta has exactly these fields."""
    if set(meta) != set(names):
        raise ValueError(f"meta has the fields {short(sorted(meta))}, not {sorted(names)}.")


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """The shape of a matrix, (rows, cols). Raises ValueError for another."""
    if len(shape) != 2:
        raise ValueError(f"shape {short(shape)} is not that of a matrix.")
    return shape[0], shape[1]


def dtype_of(meta: Meta, known: Dtypes = DTYPES) -> torch.dtype:
    """What its field `dtype` says, one of those known."""
    name = meta["dtype"]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"dtype is {short(name)}, not one of {', '.join(known)}.")
    return known[name]


def dtype_name(dtype: torch.dtype, known: Dtypes = DTYPES) -> str:
    """The inverse of `dtype_of`."""
    names = {dtype: name for name, dtype in known.items()}
    if dtype not in names:
        raise ValueError(f"{dtype} is not one of {', '.join(map(str, names))}.")
    return names[dtype]


def rounded(x: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """x in `dtype`, contiguous, on the CPU, and finite."""
    narrow = x.detach().to("cpu", dtype, copy=True).contiguous()
    if not torch.isfinite(narrow).all():
        if torch.isfinite(x).all():
            raise ValueError(f"{what} overflows {dtype_name(dtype)}: store it in a wider dtype.")
        raise ValueError(f"{what} holds NaN or Inf: there is nothing to store.")
    return narrow
