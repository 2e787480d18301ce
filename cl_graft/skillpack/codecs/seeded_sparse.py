"""`seeded_sparse`: some elements as floats at positions that a seed tells; all others are zero (as DARE drops them,
arXiv 2311.03099).

Element i is kept where the upper 48 bits of the i-th number of SplitMix64 (Steele et al. 2014) from the seed are below
`rate`: whole numbers alone, so that every machine has the same positions. meta: dtype, kept, seed, rate; parts: values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cl_graft.skillpack.codecs.codec import Scattered, register
from cl_graft.skillpack.codecs.encoded import (
    MAX_ELEMENTS,
    Encoded,
    Layout,
    Meta,
    Spec,
    dtype_name,
    dtype_of,
    fields,
    rounded,
    whole,
)

WHOLE = MAX_ELEMENTS  # the rate that keeps every element
# A small file may not name more positions than it takes to look for them.
LEAST = WHOLE >> 7
CHUNK = 1 << 20
STEP, MIX = 0x9E3779B97F4A7C15, (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def seeded_sparse(x: Tensor, seed: int, rate: int, dtype: torch.dtype = torch.bfloat16) -> Encoded:
    """The elements that the seed keeps. x: any shape. seed: 0 to 2**48. rate: 2**41 to 2**48, the share that is kept
    times 2**48. Raises ValueError on another seed or rate, on NaN, Inf or overflow."""
    whole(seed, "seed", 0)
    whole(rate, "rate", LEAST, WHOLE)
    places = kept(seed, rate, x.numel())
    values = rounded(x.detach().cpu().reshape(-1)[places], dtype, "the tensor")
    spec = seeded_sparse_spec(tuple(x.shape), len(places), seed, rate, dtype)
    return Encoded(*spec, {"values": values})


def seeded_sparse_spec(
    shape: tuple[int, ...], count: int, seed: int, rate: int, dtype: torch.dtype = torch.bfloat16
) -> Spec:
    """What `seeded_sparse` says of a tensor of which the seed keeps `count` elements."""
    meta = {"dtype": dtype_name(dtype), "kept": count, "seed": seed, "rate": rate}
    return SeededSparseCodec.name, shape, meta


def kept(seed: int, rate: int, numel: int) -> Tensor:
    """The positions of the elements that are kept: int64, strictly increasing."""
    least = np.uint64(min(rate, WHOLE - 1))
    found = [
        start + np.flatnonzero(drawn < least if rate < WHOLE else drawn <= least)
        for start, drawn in draws(seed, numel)
    ]
    return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *found]))


def draws(seed: int, numel: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first element, the upper 48 bits of SplitMix64 of it and those after it, uint64), a part at a time."""
    for start in range(0, numel, CHUNK):
        stop = min(start + CHUNK, numel)
        # all arithmetic is modulo 2**64
        x = np.arange(start + 1, stop + 1, dtype=np.uint64) * np.uint64(STEP) + np.uint64(seed)
        x = (x ^ x >> np.uint64(30)) * np.uint64(MIX[0])
        x = (x ^ x >> np.uint64(27)) * np.uint64(MIX[1])
        yield start, (x ^ x >> np.uint64(31)) >> np.uint64(16)


@register
class SeededSparseCodec(Scattered):
    name = "seeded_sparse"

    def layout(self, shape: tuple[int, ...], meta: Meta) -> Layout:
        fields(meta, "dtype", "kept", "seed", "rate")
        count = whole(meta["kept"], "kept", 0, numel := math.prod(shape))
        whole(meta["seed"], "seed", 0)
        mean = numel * whole(meta["rate"], "rate", LEAST, WHOLE) / WHOLE
        # eight standard deviations: else the positions need not be looked for
        if abs(count - mean) > 8 * math.sqrt(mean) + 8:
            raise ValueError(f"the seed keeps some {mean:.0f} elements, not {count}.")
        return {"values": (dtype_of(meta), (count,))}

    def check(self, encoded: Encoded) -> None:
        self.entries(encoded)

    def entries(self, encoded: Encoded) -> tuple[Tensor, Tensor]:
        meta, values = encoded.meta, encoded.parts["values"]
        places = kept(meta["seed"], meta["rate"], math.prod(encoded.shape))
        if len(places) != len(values):
            raise ValueError(f"the seed keeps {len(places)} elements, not {len(values)}.")
        return places, values

    def decode(self, encoded: Encoded) -> Tensor:
        places, values = self.entries(encoded)
        x = torch.zeros(math.prod(encoded.shape))
        x[places] = values.float()
        return x.reshape(encoded.shape)

    def weight_bits(self, shape: tuple[int, ...], meta: Meta) -> int:
        return 16 * meta["kept"]
