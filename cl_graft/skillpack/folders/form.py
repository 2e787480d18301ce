"""How the weights of base + pack are written: in which dtype, rounded how; and the note of it beside them.

A sum that was rounded cannot be checked by whoever does not know how. `skillpack.json` in a grafted folder says it: the
pack's digest; base and task, which are the seed of stochastic rounding; and for tensors whose rounding depended on
calibration text, which nobody may have any more, their fingerprints. A folder without it counts as rounded to nearest.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cl_graft.models.weights import CheckpointError, read_json
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.format.fingerprint import fingerprint
from cl_graft.skillpack.rounding import NARROW, in_reach, seed_of, summed

FILE = "skillpack.json"
Rounding = Literal["nearest", "stochastic", "compensated"]
ROUNDINGS: tuple[str, ...] = get_args(Rounding)
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Compensate = Callable[[str, Tensor, torch.dtype, int], Tensor | None]


@dataclass(frozen=True)
class Form:
    """How sums of weights and deltas are written.

    dtype: of all floating tensors; None is each one's in the base. rounding: of what a pack touches, where that dtype
    has 16 bits. compensate: with "compensated"; given a tensor's name, its float32 sum, a dtype and a seed, the rounded
    tensor, or None where nothing is known of its inputs: those are rounded stochastically.
    """

    dtype: torch.dtype | None = None
    rounding: Rounding = "stochastic"
    compensate: Compensate = lambda name, x, dtype, seed: None

    def dtype_of(self, before: torch.dtype) -> torch.dtype:
        """What a tensor of the base is written in."""
        return self.dtype if self.dtype and before.is_floating_point else before


@dataclass
class Record:
    """What `skillpack.json` says; base and task are the seed.

    pack: digest. fingerprints: of the tensors that calibration decided, each alone.
    """

    task: str
    pack: str
    base: str
    rounding: Rounding
    fingerprints: dict[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into a folder, in place of another pack's."""
        (folder / FILE).write_text(json.dumps(vars(self), indent=1) + "\n", encoding="utf-8")


def record_of(folder: Path, pack: SkillPack) -> Record:
    """The record of a grafted folder; where it has none, that of rounding to nearest. Raises CheckpointError."""
    if not (folder / FILE).is_file():
        return Record(pack.task, pack.digest, pack.base, "nearest")
    found: Any = read_json(folder / FILE)
    try:
        record = Record(**found)
        known = record.rounding in ROUNDINGS and isinstance(record.fingerprints, dict)
    except TypeError:
        known = False
    if not known:
        raise CheckpointError(
            f"{folder / FILE} is not as `cl-graft pack apply` wrote it; apply the pack to the base again."
        )
    return record


def rounded(x: Tensor, dtype: torch.dtype, form: Form, record: Record, name: str) -> Tensor:
    """The float32 or float64 sum of one tensor in `dtype`; what calibration decides is put down in the record."""
    if form.rounding == "nearest":
        return x.to(dtype)
    seed = seed_of([record.base, record.task], name)
    if form.rounding == "compensated" and dtype in NARROW:
        made = form.compensate(name, x.float(), dtype, seed)
        if made is not None:
            record.fingerprints[name] = fingerprint([(name, made)])
            return made
    return summed(x, dtype, seed)


def is_rounded(found: Tensor, x: Tensor, record: Record, name: str) -> bool:
    """Whether a tensor that calibration decided is what was written, and could be of this sum."""
    if found.dtype not in NARROW or fingerprint([(name, found)]) != record.fingerprints[name]:
        return False
    return bool(in_reach(found, x.float()).all())
