"""Encoded tensors from deltas, within a budget, as a policy has it.

Nothing here holds more than the tensors that read one input, and their Hessian, at a time: deltas are asked for
when their turn comes, and what is finished goes into a work store (work_store.py), where a killed run finds it again.
Second moments are visited twice, group by group: to measure, and to encode; so nobody need keep them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cl_graft.skillpack.codecs import Spec
from cl_graft.skillpack.compress.directions import Known
from cl_graft.skillpack.compress.planned import planned
from cl_graft.skillpack.compress.policy import Adaptive, Policy
from cl_graft.skillpack.compress.rated import rated
from cl_graft.skillpack.compress.work import ByteLimit, PackProgress, Piece, Work, apart
from cl_graft.skillpack.compress.work_store import WorkStore


def compress(
    pieces: Sequence[Piece],
    moments: Known,
    policy: Policy,
    limit: ByteLimit,
    store: WorkStore,
    *,
    device: torch.device | str = "cpu",
    progress: PackProgress = lambda what, done: None,
) -> dict[str, Spec]:
    """Encode every piece; results go into the work store (`work.fetch`), specs are returned, in the order of pieces.

    A tensor of which nothing is worth keeping is left out. Raises OverBudget.
    """
    parts = apart(pieces, policy)
    work = Work(parts, moments, policy, limit, store, torch.device(device), progress)
    specs = rated(work, policy) if isinstance(policy, Adaptive) else planned(work, policy)
    return {piece.name: specs[piece.name] for piece in pieces if piece.name in specs}
