"""Bytes on disk against what the same codes take in theory, and against their measured entropy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_graft.bench.statistics import bits_of_codes, rows_of_codes
from cl_graft.skillpack.codecs import least_bits
from cl_graft.skillpack.format.file import SkillPack

CODED = ("kinds", "codes")  # parts of what rows of whole numbers are stored in


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
    rows, others = [], 0
    for encoded in SkillPack.load(path).tensors.values():
        found = rows_of_codes(encoded)
        rows += found
        kept = [part for name, part in encoded.parts.items() if not found or name not in CODED]
        others += sum(part.numel() * part.element_size() for part in kept)
    bits = bits_of_codes(rows)[0] + 8 * others
    stored = path.stat().st_size
    return {
        "bytes_over_entropy": 8 * stored / bits,
        "bytes": stored,
        "entropy_bytes": round(bits / 8),
    }
