"""Two checkpoints side by side bit for bit: what a lossless pack has to hold so that every tensor comes back as it is.

Where `pair` has a policy (tied heads, buffers, zeros of either sign), nothing is left out here: the result has the
tuned model's tensors, no more and no less, each in its own dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import DTYPES
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import (
    Change,
    PairError,
    Pairing,
    change_of,
    check_complete,
    check_finite,
    same_model,
    tied_copy,
)


class BitPairing(NamedTuple):
    """pairing: its changes are the tensors that differ in any bit. absent: tensors of the base that the tuned lacks."""

    pairing: Pairing
    absent: list[str]


def pair_bits(base: Checkpoint, tuned: Checkpoint) -> BitPairing:
    """Compare two checkpoints of one architecture; reads every tensor of both once.

    Raises PairError for a difference that no lossless pack can hold, NonFinite for a weight with NaN or Inf.
    """
    notes = same_model(base, tuned)
    check_complete(base, tuned, {tied_copy(base) or ""})
    changes: list[Change] = []
    for name in tuned.tensors:
        change = _change(base, tuned, name)
        changes += [change] if change else []
    unchanged = len(tuned.tensors) - len(changes)
    if unchanged:
        notes.append(f"{unchanged} of {len(tuned.tensors)} tensors are the base's: left out.")
    absent = [name for name in base.tensors if name not in tuned.tensors]
    if absent:
        notes.append(f"{len(absent)} tensors of the base are not in the result ({absent[0]}, ...).")
    return BitPairing(Pairing(base, tuned, changes, notes), absent)


def identical(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are the same bit for bit, in dtype and shape, too, so that -0 is not 0."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _change(base: Checkpoint, tuned: Checkpoint, name: str) -> Change | None:
    """What is to be stored of a tensor: nothing where the base has the same."""
    info, before = tuned.tensors[name], base.tensors.get(name)
    both = before is not None and (before.dtype, before.shape) == (info.dtype, info.shape)
    after = tuned.read(name)
    if info.dtype.is_floating_point:
        check_finite(tuned, name, after)
    if both and identical(base.read(name), after):
        return None
    if not info.dtype.is_floating_point:
        raise PairError(
            f"{name!r} holds integers in {tuned.folder} that {base.folder} has not; a pack changes only floats."
        )
    for side, found in ((tuned, info), (base, before)):
        if found is not None and found.dtype not in DTYPES.values():
            raise PairError(
                f"{name!r} is in {found.dtype} in {side.folder}, and a lossless pack takes float32, float16 and "
                "bfloat16; save the model in one of these."
            )
    if before is not None and before.dtype.is_floating_point:
        check_finite(base, name, base.read(name))
    return change_of(base, tuned, name, name)
