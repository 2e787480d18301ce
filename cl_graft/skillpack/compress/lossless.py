"""Two checkpoint folders -> one lossless SkillPack: every tensor of the tuned model, bit for bit."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from time import perf_counter
from typing import Any

from cl_graft.skillpack.codecs import lossless, restore
from cl_graft.skillpack.compress.work import PackProgress, fetch
from cl_graft.skillpack.compress.work_store import Folder, Item
from cl_graft.skillpack.folders.apply import ABSENT, TIES
from cl_graft.skillpack.folders.besides import packed_files
from cl_graft.skillpack.folders.bits import identical, pair_bits
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import Change, PairError, embedding_and_head, tied
from cl_graft.skillpack.format.errors import CorruptPack
from cl_graft.skillpack.format.write import write_pack
from cl_graft.version import __version__

METHOD = "lossless"


@dataclass(frozen=True)
class CreatedLossless:
    """bytes: of the file. tuned_bytes: of all tensors of the tuned model. notes: what a user should know."""

    bytes: int
    tuned_bytes: int
    seconds: float
    notes: list[str]


def create_lossless(
    base: Path,
    tuned: Path,
    out: Path,
    *,
    task: str = "delta",
    progress: PackProgress = lambda what, done: None,
) -> CreatedLossless:
    """Write the lossless pack `out` of what `tuned` has learned on `base`, both Hugging Face folders.

    Each tensor is decoded again before it is kept. A killed run is continued by the same call. Memory is that of a few
    times the largest tensor. Raises CLGraftError.
    """
    begun = perf_counter()
    before, after = Checkpoint(base), Checkpoint(tuned)
    progress("comparing the checkpoints", 0.0)
    pairing, absent = pair_bits(before, after)
    if not pairing.changes:
        raise PairError(
            f"no tensor of {tuned} differs from {base}, so a pack would be empty; give the folder of the tuned model."
        )
    embedding, _ = embedding_and_head(after.tensors)
    files, more = packed_files(
        base, tuned, after.tensors[embedding].shape[0] if embedding else None
    )
    notes = [*pairing.notes, *more]
    options: dict[str, Any] = {ABSENT: absent} if absent else {}
    ties = tied(after.config)
    options |= {TIES: ties} if isinstance(ties, bool) else {}
    fields: dict[str, Any] = {
        "task": task,
        "method": METHOD,
        "options": options,
        "base": before.fingerprint(),
        "added": pairing.added,
        "grown": pairing.grown,
        "files": files,
    }
    store = Folder(_work_folder(out, after, fields))
    total, done, specs = sum(prod(c.shape) for c in pairing.changes) or 1, 0, {}
    for change in pairing.changes:
        progress("compressing", done / total)
        if f"encoded/{change.name}" not in store:
            _keep(store, before, after, change)
        specs[change.name] = fetch(store, change.name).spec
        done += prod(change.shape)
    written = write_pack(out, specs, partial(fetch, store), **fields)
    store.clear()
    size = sum(info.nbytes for info in after.tensors.values())
    return CreatedLossless(written, size, perf_counter() - begun, notes)


def _keep(store: Folder, base: Checkpoint, tuned: Checkpoint, change: Change) -> None:
    """Encode one tensor, and see that it comes back."""
    before = None if change.base_shape is None else base.read(change.name)
    after = tuned.read(change.name)
    encoded = lossless(after, before)
    if not identical(restore(encoded, before), after):
        raise CorruptPack(
            f"{change.name!r} did not come back bit for bit, so nothing is written; use constriction 0.5."
        )
    about = {"codec": encoded.codec, "shape": list(encoded.shape), "meta": encoded.meta}
    store[f"encoded/{change.name}"] = Item(encoded.parts, about)


def _work_folder(out: Path, tuned: Checkpoint, fields: dict[str, Any]) -> Path:
    """Beside the pack, named after all that the work depends on, so that another task never finds it."""
    plain = fields | {"files": {name: file.spec for name, file in fields["files"].items()}}
    digest = hashlib.blake2b(json.dumps([__version__, plain]).encode(), digest_size=6)
    for file in sorted({info.file for info in tuned.tensors.values()}):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode())
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent / f"{out.name}.{digest.hexdigest()}.work"
