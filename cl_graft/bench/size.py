"""Bytes on disk against what the same codes take in theory, and against their measured entropy."""

from __future__ import annotations

from math import fsum
from pathlib import Path
from typing import Any

import torch

from cl_graft.skillpack.codecs import Relaid, codec_named, least_bits
from cl_graft.skillpack.format.file import SkillPack

CODED = ("kinds", "codes")  # parts of what rows of whole numbers are stored in
LEAST = -(1 << 15)


def bytes_over_theory(path: Path) -> dict[str, Any]:
    """File bytes over the bytes that its codes, scales, zeros, values and positions need.

    Theory: k bits a code, 16 + k a group, 16 or 32 a value, and for the positions of a sparse tensor the logarithm of
    the number of ways to choose them (no index can be shorter on average); headers, checksums, padding count as
    nothing.
    """
    pack = SkillPack.load(path)
    needed = sum(least_bits(*encoded.spec) for encoded in pack.tensors.values()) / 8
    stored = path.stat().st_size
    return {"bytes_over_theory": stored / needed, "bytes": stored, "theory_bytes": round(needed)}


def bytes_over_entropy(path: Path) -> dict[str, Any]:
    """File bytes over those at the measured entropy of the pack's whole numbers.

    The numbers of all rows of one class count as drawn from one distribution, the one that they have. What else a
    tensor stores (scales, steps, positions) counts as it is; rows' classes, the coder's own loss, header and checksums
    count as nothing.
    """
    pack, counts, bits = SkillPack.load(path), dict[int, torch.Tensor](), 0.0
    for encoded in pack.tensors.values():
        codec = codec_named(encoded.codec)
        own = isinstance(codec, Relaid)
        others = [part for name, part in encoded.parts.items() if not own or name not in CODED]
        bits += 8 * sum(part.numel() * part.element_size() for part in others)
        if not isinstance(codec, Relaid):
            continue
        matrices = codec.codes(encoded)
        kinds = encoded.parts["kinds"].split([len(matrix) for matrix in matrices])
        for matrix, mine in zip(matrices, kinds, strict=True):
            for kind in mine.unique().tolist():
                found = torch.bincount(
                    matrix[mine == kind].reshape(-1).long() - LEAST, minlength=-2 * LEAST
                )
                counts[kind] = counts.get(kind, torch.zeros(()).long()) + found
    bits += fsum(float(_bits(found)) for found in counts.values())
    stored = path.stat().st_size
    return {
        "bytes_over_entropy": 8 * stored / bits,
        "bytes": stored,
        "entropy_bytes": round(bits / 8),
    }


def _bits(counts: torch.Tensor) -> torch.Tensor:
    """Bits of so many draws at the entropy of their own frequencies."""
    seen = counts[counts > 0].double()
    return -(seen * (seen / seen.sum()).log2()).sum()
