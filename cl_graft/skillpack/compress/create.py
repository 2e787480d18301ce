"""Two checkpoint folders -> one SkillPack, streaming, and resumable after a kill.

The order of work: pair the tensors, calibrate (each decoder layer loaded and run once), measure every delta, share
out the budget, encode, write. What is finished lies in a folder beside the pack until the pack is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch
from torch import Tensor

from cl_graft.budget import Budget
from cl_graft.errors import CLGraftError
from cl_graft.models.meta_model import MetaModel, meta_model
from cl_graft.models.roles import tied_head
from cl_graft.skillpack.codecs import decode
from cl_graft.skillpack.compress.calibrate import Batch, Moments
from cl_graft.skillpack.compress.compress import ByteLimit, PackProgress, Piece, compress, fetch
from cl_graft.skillpack.compress.dtype_cost import dtype_costs, told
from cl_graft.skillpack.compress.policy import METHODS, Policy
from cl_graft.skillpack.compress.stream import stream_moments
from cl_graft.skillpack.compress.work_store import Folder, Item
from cl_graft.skillpack.folders.besides import joined, not_in_weights
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import PairError, Pairing, add_rows, pair
from cl_graft.skillpack.format.write import packed_size, write_pack
from cl_graft.skillpack.rounding import seed_of, summed
from cl_graft.version import __version__


@dataclass(frozen=True)
class Calibration:
    """Text that the tuned model reads. batches: input_ids, attention_mask, labels, each (sequences, length) int64.

    gradient_batches: how many of them, from the first, also go through the backward pass that tells what each
    matrix's output is worth. prefix: whether layers read what the tuned model feeds them, or what the compressed
    one does (then everything is done twice, the second time behind the first result).
    """

    batches: Sequence[Batch]
    gradient_batches: int = 1
    prefix: Literal["tuned", "compressed"] = "tuned"


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
    """Write the pack `out` of what `tuned` has learned on `base`, both Hugging Face folders.

    budget: as of `Budget`, a share of the base in bf16, or bytes; met from below. policy: of `method`, with its
    defaults where it is None. calibration: None for the data-free mode. A killed run is continued by the same
    call. Raises CLGraftError.
    """
    seconds: dict[str, float] = {}
    policy = policy or METHODS[method]()
    before, after = Checkpoint(base), Checkpoint(tuned)
    allowed = Budget(budget, sum(prod(before.tensors[n].shape) for n in before.floating))
    with _timed(seconds, "pair"):
        progress("comparing the checkpoints", 0.0)
        pairing, meta = pair(before, after), meta_model(tuned)
        fingerprint = before.fingerprint()
    if not pairing.changes:
        raise PairError(
            f"no tensor of {tuned} differs from {base}, so a pack would be empty; give the folder of the tuned model."
        )
    besides = not_in_weights(base, tuned)
    notes = list(pairing.notes)
    if besides:
        what = joined([name + more for name, more in besides.items()])
        notes.append(
            f"The tuned model has its own {what}: not in the pack, but taken over by "
            f"`cl-graft pack apply --tokenizer {tuned}`."
        )
    options = {"budget": budget, "calibrated": calibration is not None, **_plain(policy)}
    options |= {"not_in_pack": list(besides)} if besides else {}
    fields: dict[str, Any] = {
        "task": task,
        "method": method,
        "options": options,
        "base": fingerprint,
        "added": pairing.added,
        "grown": pairing.grown,
    }
    limit = ByteLimit(partial(_size, fields), allowed.bytes, budget)
    work = _work_folder(out, pairing, fields, calibration, device)
    weights = None
    rounds = 2 if calibration and calibration.prefix == "compressed" else 1
    for number in range(rounds):
        store = Folder(work / str(number))
        moments = Moments()
        if calibration:
            with _timed(seconds, "calibrate"):
                moments = _calibrated(pairing, meta, calibration, store, weights, device, progress)
                notes += [meta.note] if meta.note and not number else []
        with _timed(seconds, "compress"):
            pieces, renamed = _pieces(pairing, meta), _by_key(moments, pairing, meta)
            specs = compress(
                pieces, renamed, policy, limit, store, device=device, progress=progress
            )
        weights = partial(_compressed, pairing, set(specs), store)
    with _timed(seconds, "measure"):
        kept = [(p.name, p.role, p.transposed) for p in pieces if p.name in specs]
        costs = dtype_costs(before, kept, partial(fetch, store), renamed)
        notes += [told(costs, before.dtype)] if costs else []
    with _timed(seconds, "write"):
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
        )
        for change in pairing.changes
    ]


def _by_key(moments: Moments, pairing: Pairing, meta: MetaModel) -> Moments:
    """Moments by the names of the checkpoint's tensors, too, not by the model's parameters alone."""
    reads, outputs = dict(moments.reads), dict(moments.outputs)
    for change in pairing.changes:
        name = meta.parameter_of(change.source)
        if name in moments.reads:
            reads[change.name] = moments.reads[name]
        if name in moments.outputs and meta.key_of(name) is not None:  # not one of several parts
            outputs[change.name] = moments.outputs[name]
    return Moments(moments.inputs, reads, outputs)


def _calibrated(
    pairing: Pairing,
    meta: MetaModel,
    calibration: Calibration,
    store: Folder,
    weights: Callable[[str], Tensor] | None,
    device: str,
    progress: PackProgress,
) -> Moments:
    """Moments whose inputs lie in the work store; an earlier run's, if it got so far."""
    inputs = _Inputs(store)
    if "moments" not in store:
        check_disk(meta, store.path)
        measured = stream_moments(
            pairing.tuned,
            meta,
            calibration.batches,
            gradient_batches=calibration.batches[: calibration.gradient_batches],
            device=device,
            sink=inputs,
            weights=weights,
            progress=partial(progress, "calibrating"),
        )
        store["moments"] = Item(measured.outputs, {"reads": measured.reads})
    outputs, about = store["moments"]
    return Moments(inputs, about["reads"], outputs)


class _Inputs(Mapping[str, Tensor]):
    """Second moments in a work store. Called with a group and its moments it puts them there."""

    def __init__(self, store: Folder):
        self.store = store

    def __call__(self, group: str, moments: Tensor) -> None:
        self.store[f"inputs/{group}"] = Item({"moments": moments}, {})

    def __getitem__(self, group: str) -> Tensor:
        return self.store[f"inputs/{group}"].tensors["moments"]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix("inputs/") for key in self.store if key.startswith("inputs/"))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _compressed(pairing: Pairing, kept: set[str], store: Folder, name: str) -> Tensor:
    """A tensor of the compressed model: the base's, and what the pack keeps of the delta."""
    tuned = pairing.tuned.tensors[name]
    if not tuned.dtype.is_floating_point:
        return pairing.tuned.read(name)
    weight = decode(fetch(store, name)) if name in kept else torch.zeros(tuned.shape)
    if name in pairing.base.tensors:
        add_rows(weight, pairing.base.read(name))
    return summed(weight, tuned.dtype, seed_of([], name))


def check_disk(meta: MetaModel, folder: Path) -> None:
    """Raise CLGraftError where the second moments of all layers' inputs will not fit beside a folder."""
    widths = [p.shape[-1] for p in meta.model.parameters() if p.ndim == 2]
    needed, free = 4 * sum(w * w for w in widths) // 2, shutil.disk_usage(folder).free
    if free < needed:
        raise CLGraftError(
            f"calibration keeps about {needed / 1e9:.1f} GB beside the pack for a while, and {folder} has "
            f"{free / 1e9:.1f} GB left; free some, or write the pack elsewhere."
        )


def _work_folder(
    out: Path,
    pairing: Pairing,
    fields: dict[str, Any],
    calibration: Calibration | None,
    device: str,
) -> Path:
    """Beside the pack, named after all that the work depends on, so that another task never finds it."""
    digest = hashlib.blake2b(digest_size=6)
    digest.update(json.dumps([__version__, torch.__version__, device, fields]).encode())
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


@contextmanager
def _timed(seconds: dict[str, float], kind: str) -> Iterator[None]:
    """Adds the seconds of a block to one kind of work."""
    begun = perf_counter()
    try:
        yield
    finally:
        seconds[kind] = seconds.get(kind, 0.0) + perf_counter() - begun
