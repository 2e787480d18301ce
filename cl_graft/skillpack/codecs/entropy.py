"""Entropy coding of rows of small integers: an ANS stack under tables that are the same on every machine.

A table is a distribution of the codes -top .. top in whole parts of 2**24. It is made by sums, products, quotients and
square roots of float64 alone, each of which IEEE 754 defines to the last bit, so that a stream is read anywhere as it
was written. The coder is that of the library constriction (arXiv 2201.01741), which is given whole numbers that add up
to just what it divides, so that it has nothing to round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

PARTS = 1 << 24
TOP = 8191  # the largest magnitude of a code
SCALES = 40  # mean magnitudes of a family, half an octave apart
FAMILIES = 3  # geometric tails, squared ones, and the mean of both
CLASSES = 1 + FAMILIES * SCALES  # class 0: all zeros, nothing is stored


@lru_cache(maxsize=512)
def frequencies(kind: int, top: int) -> np.ndarray:
    """Parts of 2**24 of the codes -top .. top in class `kind`, from 1 on: int64 (2 * top + 1,), each positive."""
    family, scale = divmod(kind - 1, SCALES)
    magnitude = 2.0 ** (scale // 2 - 7) * (math.sqrt(2.0) if scale % 2 else 1.0)
    tails = []
    if family != 1:
        tails.append(_normalised(_geometric(magnitude)[: top + 1]))
    if family != 0:
        tails.append(_normalised(_squared(magnitude)[: top + 1]))
    weights = np.sum(tails, 0) / len(tails)
    free = PARTS - (2 * top + 1)
    side = 1 + np.floor(weights[1:] * free).astype(np.int64)
    return np.concatenate([side[::-1], [PARTS - 2 * side.sum()], side])


@lru_cache(maxsize=SCALES)
def _geometric(magnitude: float) -> np.ndarray:
    """q**abs(z) of z = 0 .. TOP, with E abs(z) = magnitude: float64."""
    q = (math.sqrt(1.0 + magnitude * magnitude) - 1.0) / magnitude
    return np.cumprod([1.0] + [q] * TOP)


@lru_cache(maxsize=SCALES)
def _squared(magnitude: float) -> np.ndarray:
    """g**(z * z) of z = 0 .. TOP, with E abs(z) about magnitude: float64."""
    spread = 3.14 * magnitude * magnitude + 0.5 * magnitude
    g = spread / (1.0 + spread)
    ratios = np.cumprod([g] + [g * g] * (TOP - 1))
    return np.cumprod(np.concatenate([[1.0], ratios]))


def _normalised(powers: np.ndarray) -> np.ndarray:
    """Over both sides, the sum rounded once whatever its order."""
    return powers / math.fsum([powers[0], *powers[1:].tolist(), *powers[1:].tolist()])


@lru_cache(maxsize=64)
def _lengths(top: int) -> Tensor:
    """Bits of each magnitude in each class: float32 (CLASSES - 1, top + 1)."""
    rows = [frequencies(kind, top)[top:] for kind in range(1, CLASSES)]
    return torch.from_numpy(24 - np.log2(np.stack(rows))).float()


def classes_of(codes: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """The class of each row that stores it shortest, or nearly so, and about its bits. codes: int16 (rows, n).

    Returns uint8 (rows,), 0 for rows of zeros; and float64 (rows,).
    """
    kinds = torch.zeros(len(codes), dtype=torch.uint8)
    bits = torch.zeros(len(codes), dtype=torch.float64)
    if not codes.numel():
        return kinds, bits
    # a longer table's classes are about as long, and a few tables do for all
    lengths = _lengths(min(TOP, (1 << top.bit_length()) - 1))[:, : top + 1]
    for start in range(0, len(codes), step := max(1, (1 << 22) // max(top + 1, codes.shape[1]))):
        part = codes[start : start + step].abs().long()
        counts = torch.zeros(len(part), top + 1).scatter_add_(
            1, part, torch.ones(()).expand(part.shape)
        )
        best = (counts @ lengths.T).min(1)
        alive = part.amax(1) > 0
        kinds[start : start + step] = torch.where(alive, best.indices + 1, 0).to(torch.uint8)
        bits[start : start + step] = torch.where(alive, best.values, 0.0).double()
    return kinds, bits


def encode(matrices: Sequence[Tensor], kinds: Sequence[Tensor], top: int) -> Tensor:
    """Codes of matrices, int16 (rows, n) each, by the classes of their rows, uint8 (rows,): uint8 (bytes,).

    The rows of class 1 of all matrices come first, then those of class 2, and so on.
    """
    coder = _constriction().stream.stack.AnsCoder()
    for kind in sorted({int(k) for each in kinds for k in each.unique()} - {0}, reverse=True):
        rows = [m[k == kind].reshape(-1) for m, k in zip(matrices, kinds, strict=True)]
        symbols = torch.cat(rows).numpy().astype(np.int32) + top
        coder.encode_reverse(symbols, _model(kind, top))
    words = np.ascontiguousarray(coder.get_compressed().astype("<u4"))
    return torch.from_numpy(words.view(np.uint8).copy())


def decode(
    stream: Tensor, sizes: Sequence[tuple[int, int]], kinds: Sequence[Tensor], top: int
) -> list[Tensor]:
    """The inverse of `encode`: int16 of these sizes. Raises ValueError unless the stream is that of its codes."""
    words = np.frombuffer(stream.numpy().tobytes(), dtype="<u4").astype(np.uint32)
    if len(words) and not words[-1]:
        raise ValueError("the coded stream ends in a word of zeros.")
    coder = _constriction().stream.stack.AnsCoder(words)
    results = [torch.zeros(size, dtype=torch.int16) for size in sizes]
    for kind in sorted({int(k) for each in kinds for k in each.unique()} - {0}):
        where = [k == kind for k in kinds]
        counts = [int(w.sum()) * size[1] for w, size in zip(where, sizes, strict=True)]
        symbols = coder.decode(_model(kind, top), sum(counts)) - top
        parts = torch.from_numpy(symbols.astype(np.int16)).split(counts)
        for result, w, part in zip(results, where, parts, strict=True):
            if part.numel():
                result[w] = part.view(-1, result.shape[1])
    if not coder.is_empty():
        raise ValueError("the coded stream holds more than its codes.")
    return results


@lru_cache(maxsize=512)
def _model(kind: int, top: int) -> Any:
    # every symbol has one part beforehand, so that what is left adds up to what the library shares out
    weights = (frequencies(kind, top) - 1).astype(np.float64)
    return _constriction().stream.model.Categorical(weights, perfect=False)


def _constriction() -> Any:
    import constriction

    return constriction
