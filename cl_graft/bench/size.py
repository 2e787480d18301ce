"""Bytes on disk against what the same codes take in theory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cl_graft.skillpack.codecs import least_bits
from cl_graft.skillpack.format.file import SkillPack


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
