"""Tensors to encode, of any values that a format can hold."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cl_graft.skillpack.codecs.quant import Quantized


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (x * 1e-2).to(dtype)


def grid(rows: int, cols: int, width: int, size: int, seed: int) -> Quantized:
    """Any codes, zeros and scales, also those that no quantiser would choose."""
    g = torch.Generator().manual_seed(seed)
    groups = math.ceil(cols / size)
    return Quantized(
        torch.randint(0, 2**width, (rows, cols), dtype=torch.uint8, generator=g),
        torch.randn(rows, groups, generator=g).half(),
        torch.randint(0, 2**width, (rows, groups), dtype=torch.uint8, generator=g),
        width,
        size,
        exponent=seed % 41 - 20,
    )
