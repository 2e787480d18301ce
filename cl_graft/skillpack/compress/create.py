"""Two checkpoint folders -> one SkillPack, streaming, and resumable after a kill.

The order of work: pair the tensors; measure the gradients; load and run each decoder layer and measure its deltas on
what it reads; share out the budget; load and run each layer again and encode its deltas; write. What is finished lies
in a folder beside the pack until the pack is whole. Second moments lie there only while all of them are little; those
of a large model are made again by the second pass.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cl_graft.budget import Budget
from cl_graft.errors import CLGraftError
from cl_graft.models.meta_model import MetaModel, meta_model
from cl_graft.models.roles import tied_head
from cl_graft.skillpack.codecs import decode
from cl_graft.skillpack.compress.calibrate import Moments
from cl_graft.skillpack.compress.calibrated import Calibrated, Calibration, timed
from cl_graft.skillpack.compress.compress import compress
from cl_graft.skillpack.compress.directions import (
    Known,
    directions_bytes,
    wanted_directions,
)
from cl_graft.skillpack.compress.dtype_cost import dtype_costs, told
from cl_graft.skillpack.compress.policy import METHODS, Adaptive, Policy
from cl_graft.skillpack.compress.work import ByteLimit, PackProgress, Piece, apart, fetch
from cl_graft.skillpack.compress.work_store import Folder
from cl_graft.skillpack.folders.besides import packed_files
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import (
    PairError,
    Pairing,
    add_rows,
    embedding_and_head,
    pair,
)
from cl_graft.skillpack.folders.tuned import tuned_checkpoint
from cl_graft.skillpack.format.write import packed_size, write_pack
from cl_graft.skillpack.rounding import seed_of, summed
from cl_graft.version import __version__


@dataclass(frozen=True)
class Created:
    """bytes: of the file. seconds: by kind of work, this run alone. notes: what a user should know.

    rounding: what the base's dtype costs the pack, rows by role (`DtypeCost.row`); none where it is no narrow one.
    """

    bytes: int
    limit: int
    seconds: dict[str, float]
    notes: list[str]
    rounding: list[dict[str, object]] = field(default_factory=list)


def create(
    base: Path,
    tuned: Path,
    out: Path,
    *,
    budget: str = "5%",
    method: str = "graftllm_adaptive",
    policy: Policy | None = None,
    calibration: Calibration | None = None,
    task: str = "delta",
    device: str = "cpu",
    progress: PackProgress = lambda what, done: None,
) -> Created:
    """Write the pack `out` of what `tuned` has learned on `base`, a Hugging Face folder; see `tuned_checkpoint`.

    budget: as of `Budget`, a share of the base in bf16, or bytes; met from below. policy: of `method`, with its
    defaults where it is None. calibration: None for the data-free mode. A killed run is continued by the same
    call. Raises CLGraftError.
    """
    seconds: dict[str, float] = {}
    policy = policy or METHODS[method]()
    before = Checkpoint(base)
    after = tuned_checkpoint(tuned, before)
    allowed = Budget(budget, sum(prod(before.tensors[n].shape) for n in before.floating))
    with timed(seconds, "pair"):
        progress("comparing the checkpoints", 0.0)
        pairing, meta = pair(before, after), meta_model(after.folder)
        fingerprint = before.fingerprint()
    if not pairing.changes:
        raise PairError(
            f"no tensor of {tuned} differs from {base}, so a pack would be empty; give the folder of the tuned model."
        )
    embedding, _ = embedding_and_head(after.tensors)
    files, more = packed_files(
        base, tuned, after.tensors[embedding].shape[0] if embedding else None
    )
    notes = [*pairing.notes, *more]
    options = {"budget": budget, "calibrated": calibration is not None, **_plain(policy)}
    fields: dict[str, Any] = {
        "task": task,
        "method": method,
        "options": options,
        "base": fingerprint,
        "added": pairing.added,
        "grown": pairing.grown,
        "files": files,
    }
    limit = ByteLimit(partial(_size, fields), allowed.bytes, budget)
    work = _work_folder(out, pairing, fields, calibration, device)
    weights = None
    rounds = 2 if calibration and calibration.prefix == "compressed" else 1
    for number in range(rounds):
        store = Folder(work / str(number))
        moments: Known = Moments()
        pieces = _pieces(pairing, meta)
        keep = calibration is not None and moments_bytes(pieces) <= MOMENTS_BYTES
        _check_disk(store.path, work_bytes(pieces, policy, allowed.bytes, rounds, keep))
        if calibration:
            with timed(seconds, "calibrate"):
                moments = Calibrated(
                    pairing, meta, calibration, store, weights, device, progress, seconds, keep
                )
                notes += [meta.note] if meta.note and not number else []
        with timed(seconds, "compress"):
            specs = compress(
                pieces, moments, policy, limit, store, device=device, progress=progress
            )
        weights = partial(_compressed, pairing, set(specs), store)
    notes += moments.notes if isinstance(moments, Calibrated) else []
    with timed(seconds, "measure"):
        kept = [(p.name, p.role, p.transposed) for p in pieces if p.name in specs]
        costs = dtype_costs(before, kept, partial(fetch, store))
        notes += [told(costs, before.dtype)] if costs else []
    with timed(seconds, "write"):
        written = write_pack(out, specs, partial(fetch, store), **fields)
    shutil.rmtree(work, ignore_errors=True)
    return Created(written, allowed.bytes, seconds, notes, [cost.row() for cost in costs])


def _plain(policy: Policy) -> dict[str, Any]:
    """Options for a header: JSON has no integer keys."""
    split = {str(k): v for k, v in getattr(policy, "split", {}).items()}
    return asdict(policy) | ({"split": split} if split else {})


def _size(fields: dict[str, Any], specs: Mapping[str, Any]) -> int:
    """Bytes of the pack as far as it is planned."""
    added = [name for name in fields["added"] if name in specs]
    grown = {name: shape for name, shape in fields["grown"].items() if name in specs}
    return packed_size(specs, **{**fields, "added": added, "grown": grown})


def _pieces(pairing: Pairing, meta: MetaModel) -> list[Piece]:
    head = tied_head(meta.model)
    return [
        Piece(
            change.name,
            change.shape,
            meta.role_of(change.source),
            partial(pairing.delta, change.name),
            transposed=meta.is_transposed(change.source),
            head=head.get(meta.parameter_of(change.source) or ""),
            whole=change.base_shape is None,
            present=meta.role_of(change.source) in ("embedding", "head"),
            rows=meta.stacked_as(change.source) == "vectors",
            matrix=partial(pairing.delta, change.name)
            if meta.stacked_as(change.source) == "matrices"
            else None,
            expert=meta.expert_of(change.source),
        )
        for change in pairing.changes
    ]


ABOUT = 6000  # bytes of what is said of a tensor and its group in the work folder
MOMENTS_BYTES = 600_000_000  # of second moments that are kept rather than made a second time


def moments_bytes(pieces: Sequence[Piece]) -> int:
    """Bytes that the second moments of all matrices' inputs take at most: fewer where matrices read one input."""
    parts = apart(pieces, Adaptive())
    widths = [p.shape[0 if p.transposed else 1] for p in parts if p.kind == "matrix"]
    return sum(4 * width**2 for width in widths)


def work_bytes(
    pieces: Sequence[Piece], policy: Policy, limit: int, rounds: int = 1, keep: bool = False
) -> int:
    """Most bytes that lie in the work folder at one time, for a pack of `limit` bytes.

    Directions wait there until what is made of them takes their place, energies and diagonals stay. rounds: 2 for
    the prefix of the compressed model, whose first result stays until the second is whole. keep: whether second
    moments stay, too.
    """
    parts = apart(pieces, policy)
    matrices = {piece.name: piece.shape for piece in parts if piece.kind == "matrix"}
    waiting = directions_bytes(matrices, wanted_directions(matrices, policy, limit))
    small = sum(8 * sum(piece.shape) + ABOUT for piece in parts)
    small += moments_bytes(pieces) if keep else 0
    return max(limit, sum(waiting.values())) + (rounds - 1) * limit + rounds * small


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CLGraftError(
            f"up to {needed / 1e9:.1f} GB lie beside the pack while it is made, and {folder} has "
            f"{free / 1e9:.1f} GB left; free some, or write the pack elsewhere."
        )


def _compressed(pairing: Pairing, kept: set[str], store: Folder, name: str) -> Tensor:
    """A tensor of the compressed model: the base's, and what the pack keeps of the delta."""
    tuned = pairing.tuned.tensors[name]
    if not tuned.dtype.is_floating_point:
        return pairing.tuned.read(name)
    weight = decode(fetch(store, name)) if name in kept else torch.zeros(tuned.shape)
    if name in pairing.base.tensors:
        add_rows(weight, pairing.base.read(name))
    return summed(weight, tuned.dtype, seed_of([], name))


def _work_folder(
    out: Path,
    pairing: Pairing,
    fields: dict[str, Any],
    calibration: Calibration | None,
    device: str,
) -> Path:
    """Beside the pack, named after all that the work depends on, so that another task never finds it."""
    digest = hashlib.blake2b(digest_size=6)
    plain = fields | {"files": {name: file.spec for name, file in fields["files"].items()}}
    digest.update(json.dumps([__version__, torch.__version__, device, plain]).encode())
    for file in sorted({info.file for info in pairing.tuned.tensors.values()}):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    if calibration:
        digest.update(f"{calibration.gradient_batches} {calibration.prefix}".encode())
        for batch in calibration.batches:
            for _, tensor in sorted(batch.items()):
                digest.update(tensor.numpy().tobytes())
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent / f"{out.name}.{digest.hexdigest()}.work"
