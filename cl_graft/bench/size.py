"""Bytes on disk against what the same codes take in theory."""

from __future__ import annotations

from math import lgamma, log
from pathlib import Path
from typing import Any

from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.quant import groups_in
from cl_graft.skillpack.format.file import SkillPack


def bytes_over_theory(path: Path) -> dict[str, Any]:
    """File bytes over the bytes that its codes, scales, zeros, values and positions need.

    Theory: k bits a code, 16 + k a group, 16 or 32 a value, and for the positions of a sparse tensor the logarithm of
    the number of ways to choose them (no index can be shorter on average); headers, checksums, padding count as
    nothing.
    """
    pack = SkillPack.load(path)
    needed = sum(_bits(encoded) for encoded in pack.tensors.values()) / 8
    stored = path.stat().st_size
    return {"bytes_over_theory": stored / needed, "bytes": stored, "theory_bytes": round(needed)}


def _bits(encoded: Encoded) -> float:
    shape, meta = encoded.shape, encoded.meta
    numel = 1
    for size in shape:
        numel *= size
    if encoded.codec == "quantized_low_rank":
        rows, cols = shape
        return sum(
            rank * (bits * (rows + cols) + (16 + bits) * (groups_in(rows, a) + groups_in(cols, b)))
            for rank, bits, a, b in meta["groups"]
        )
    value = {"F32": 32, "BF16": 16, "F16": 16}.get(meta.get("dtype", "BF16"), 16)
    if encoded.codec == "sparse":
        kept = meta["kept"]
        ways = lgamma(numel + 1) - lgamma(kept + 1) - lgamma(numel - kept + 1)
        return kept * value + ways / log(2)
    if encoded.codec == "low_rank":
        return meta["rank"] * sum(shape) * value
    if encoded.codec == "quantized":
        groups = shape[0] * groups_in(shape[1], meta["group_size"])
        return numel * meta["bits"] + groups * (16 + meta["bits"])
    return numel * (1 if encoded.codec == "sign_scale" else value)
