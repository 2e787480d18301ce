"""The parts of the quantised codecs: codes and zeros of all their grids (packing.Grid) lie one after the
other in the part `codes`, bit-packed uint8, and their scales in the part `scales`, float16."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import packing
from cl_graft.skillpack.codecs.encoded import Encoded, Layout, rounded, whole
from cl_graft.skillpack.codecs.packing import Grid
from cl_graft.skillpack.codecs.quant import BITS, Quantized


def checked_grid(rows: int, cols: int, bits: object, group_size: object) -> Grid:
    """The grid that a meta says. Raises ValueError on nonsense."""
    bits = whole(bits, "bits", 0)
    if bits not in BITS:
        raise ValueError(f"bits is {bits}, not one of {BITS}.")
    return Grid(rows, cols, bits, whole(group_size, "a group size", 1))


def layout_of(grids: Sequence[Grid]) -> Layout:
    """The parts that hold these grids."""
    codes, scales = sum(grid.bytes for grid in grids), sum(grid.scales for grid in grids)
    return {"codes": (torch.uint8, (codes,)), "scales": (torch.float16, (scales,))}


def least_bits(grids: Sequence[Grid]) -> int:
    """Bits of codes, zeros and scales, without exponents and padding."""
    return sum(grid.values * grid.bits + 16 * grid.scales for grid in grids)


def pack(matrices: Sequence[Quantized]) -> dict[str, Tensor]:
    """The parts of these matrices. Raises ValueError on codes beyond their bits or scales beyond float16."""
    codes = [packing.pack_quantized(q) for q in matrices]
    scales = [rounded(q.scale, torch.float16, "a scale").reshape(-1) for q in matrices]
    return {
        "codes": torch.cat([torch.empty(0, dtype=torch.uint8), *codes]),
        "scales": torch.cat([torch.empty(0, dtype=torch.float16), *scales]),
    }


def check(encoded: Encoded, grids: Sequence[Grid]) -> None:
    """Raise ValueError where a grid's exponent is out of range or bits are set after its end."""
    codes = encoded.parts["codes"].split([grid.bytes for grid in grids])
    for packed, grid in zip(codes, grids, strict=True):
        packing.check_quantized(packed, grid)


def unpack(encoded: Encoded, grids: Sequence[Grid]) -> list[Tensor]:
    """The matrices, float32 (rows, cols) each."""
    codes = encoded.parts["codes"].split([grid.bytes for grid in grids])
    scales = encoded.parts["scales"].split([grid.scales for grid in grids])
    parts = zip(codes, scales, grids, strict=True)
    return [packing.unpack_quantized(*part).dequantize() for part in parts]
