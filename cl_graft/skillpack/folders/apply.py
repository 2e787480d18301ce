"""Packs on checkpoint folders: base + pack as a new folder, and the check that a folder is just that.

One tensor at a time. `result` is the one place that says what base + pack is, form.py how it is rounded.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Collection
from math import prod
from typing import Any

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import kept_dtype
from cl_graft.skillpack.folders.besides import joined, with_settings
from cl_graft.skillpack.folders.bits import identical
from cl_graft.skillpack.folders.checkpoint import (
    MAX_SHARD_BYTES,
    Checkpoint,
    Specs,
    write_checkpoint,
)
from cl_graft.skillpack.folders.form import Form, Record, is_rounded, record_of, rounded
from cl_graft.skillpack.folders.pair import (
    add_rows,
    embedding_and_head,
    tied,
    tied_copy,
)
from cl_graft.skillpack.format.errors import NonFinite, ShapeMismatch, SkillPackError, WrongBase
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.format.files import VOCABULARY, parse
from cl_graft.skillpack.rounding import all_finite

Folder = str | os.PathLike[str]
# options of a lossless pack: tensors of the base that the tuned model lacks, and whether its head is tied
ABSENT, TIES = "absent", "tie_word_embeddings"
AS_BASE = Form()


class NotGrafted(SkillPackError):
    """A folder that is not base + pack."""


def apply_pack(
    base_dir: Folder,
    pack: SkillPack,
    out_dir: Folder,
    *,
    form: Form = AS_BASE,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[str]:
    """Write base + pack as a Hugging Face folder; returns a sentence for each thing adjusted.

    Deltas are added in float32 and rounded as `form` says, by default stochastically to the base's dtype; tensors
    without a delta stay as they are, or are rounded to nearest where the form has a narrower dtype. Of a lossless pack
    every tensor is the tuned one, bit for bit, in its own dtype. How it was done is written to the folder's
    skillpack.json. What else the pack holds (chat template, tokenizer, settings) takes the place of the base's; all
    other files are the base's. Raises WrongBase or ShapeMismatch before anything is written, NonFinite where a weight
    overflows its dtype, SkillPackError for a lossless pack in another dtype, CheckpointError for the folders.
    """
    base = Checkpoint(base_dir)
    check_base(base, pack)
    if pack.lossless and form.dtype is not None:
        raise SkillPackError(
            f"the pack of task {pack.task!r} keeps the tuned tensors bit for bit, each in its own dtype; apply it "
            "without --dtype."
        )
    dropped = _dropped(base, pack)
    specs, record = _specs(base, pack, dropped, form), _record(pack, form)
    config, notes = _config(base, pack, dropped)
    notes += _kept_in(config, base, specs) if pack.lossless else []
    if form.dtype is not None:
        _set_dtype(config, str(form.dtype).removeprefix("torch."))
    notes = [*base.notes, *notes]
    files = {name: f.content() for name, f in pack.files.items() if name != "config.json"}
    if pack.files:
        notes.append(f"{joined(sorted(pack.files))}: as the tuned model has it.")
    if pack.grown and not files.keys() & set(VOCABULARY):
        notes.append(f"{out_dir} has the base's tokenizer: the pack holds no other.")
    write_checkpoint(
        out_dir,
        specs,
        lambda name: result(base, pack, name, form, record),
        base,
        config=config,
        files=files,
        finish=record.write,
        max_shard_bytes=max_shard_bytes,
    )
    return notes


def remove_pack(
    grafted_dir: Folder, pack: SkillPack, base_dir: Folder, out_dir: Folder | None = None
) -> int:
    """Check that a folder is base + pack bit for bit, and return how many tensors were compared.

    It may have any dtype, and be rounded in any way that its skillpack.json tells. Of tensors that calibration text
    decided, the fingerprint is compared, and that each entry is near its sum. Then, if `out_dir` is given,
    write the base's tensors there, bit for bit. Raises NotGrafted naming the tensors that differ, and what `apply_pack`
    raises.
    """
    base, grafted = Checkpoint(base_dir), Checkpoint(grafted_dir)
    check_base(base, pack)
    record = record_of(grafted.folder, pack)
    form, dropped = Form(rounding=record.rounding), _dropped(base, pack)
    specs = _specs(base, pack, dropped, form)
    if any(n in specs and info.dtype != specs[n][0] for n, info in grafted.tensors.items()):
        form = Form(grafted.dtype, record.rounding)
        specs = _specs(base, pack, dropped, form)
    shapes = {name: (info.dtype, info.shape) for name, info in grafted.tensors.items()}
    differing = [name for name in specs if shapes.get(name) != specs[name]]
    differing += [name for name in shapes if name not in specs]
    for name in specs:
        if name in differing:
            continue
        found = grafted.read(name)
        if name in record.fingerprints and name in pack.tensors:
            same = is_rounded(found, summed(base, pack, name), record, name)
        else:
            same = identical(found, result(base, pack, name, form, record))
        if not same:
            differing.append(name)
    if differing:
        named = ", ".join(differing[:5]) + (", ..." if len(differing) > 5 else "")
        raise NotGrafted(
            f"{grafted_dir} is not {base_dir} with the pack of task {pack.task!r}: "
            f"{len(differing)} tensors differ ({named}); apply the pack to the base again."
        )
    if out_dir is not None:
        whole = {name: (info.dtype, info.shape) for name, info in base.tensors.items()}
        write_checkpoint(out_dir, whole, base.read, base)
    return len(specs)


def check_base(base: Checkpoint, pack: SkillPack) -> None:
    """Raise ShapeMismatch or WrongBase unless the pack was made for these weights."""
    for name, encoded in pack.tensors.items():
        there = base.tensors[name].shape if name in base.tensors else None
        wanted: tuple[int, ...] | None = tuple(pack.grown.get(name, encoded.shape))
        wanted = None if name in pack.added else wanted
        if there != wanted:
            raise ShapeMismatch(
                f"the pack of task {pack.task!r} wants tensor {name!r} to be {_told(wanted)} in the "
                f"base, but it is {_told(there)} in {base.folder}; give the base it was made on."
            )
    fingerprint = base.fingerprint()
    if pack.base != fingerprint:
        raise WrongBase(
            f"the pack of task {pack.task!r} is for base {pack.base!r}, but {base.folder} is "
            f"{fingerprint!r}; give the base it was made on."
        )


def result(base: Checkpoint, pack: SkillPack, name: str, form: Form, record: Record) -> Tensor:
    """One tensor of base + pack in the form's dtype; an added one in that of most of the base where it has none; one
    that is kept itself in its own.

    record: has the seed, and takes what the form's calibration decided. Raises NonFinite where it overflows the dtype.
    """
    before = base.dtype if name in pack.added else base.tensors[name].dtype
    dtype = form.dtype_of(before)
    if name not in pack.tensors:
        weight = base.read(name).to(dtype)
        if dtype == before:
            return weight
    elif kept_dtype(pack.tensors[name]) is not None:
        return pack.tuned(name, None if name in pack.added else base.read(name))
    else:
        weight = rounded(summed(base, pack, name), dtype, form, record, name)
    if weight.is_floating_point() and not all_finite(weight):
        raise NonFinite(
            f"tensor {name!r} overflows {dtype} under {pack.task!r}; apply the pack with --dtype float32."
        )
    return weight


def summed(base: Checkpoint, pack: SkillPack, name: str) -> Tensor:
    """Base + delta of a tensor that the pack touches, float32, or float64 where the base is.

    Of a tensor with another number of rows, rows that the base lacks count as zero there, and surplus rows are cut.
    """
    weight = pack.delta(name)
    if name not in pack.added:
        before = base.read(name)
        weight = weight.to(torch.promote_types(before.dtype, torch.float32))
        add_rows(weight, before)
    return weight


def delta(base: Checkpoint, pack: SkillPack, name: str) -> Tensor:
    """What a pack adds to a tensor of the base, float32: `pack.delta`, or the tuned tensor minus the base's."""
    if kept_dtype(pack.tensors[name]) is None:
        return pack.delta(name)
    before = None if name in pack.added else base.read(name)
    weight = pack.tuned(name, before).float()
    if before is not None:
        add_rows(weight, before, -1)
    return weight


def _record(pack: SkillPack, form: Form) -> Record:
    return Record(pack.task, pack.digest, pack.base, form.rounding)


def _specs(base: Checkpoint, pack: SkillPack, dropped: Collection[str], form: Form) -> Specs:
    specs = {}
    for name, info in base.tensors.items():
        shape = pack.tensors[name].shape if name in pack.tensors else info.shape
        specs[name] = (form.dtype_of(info.dtype), tuple(shape))
    added = form.dtype_of(base.dtype)
    specs |= {name: (added, tuple(pack.tensors[name].shape)) for name in pack.added}
    for name, encoded in pack.tensors.items():
        specs[name] = (kept_dtype(encoded) or specs[name][0], specs[name][1])
    return {name: spec for name, spec in specs.items() if name not in dropped}


def _dropped(base: Checkpoint, pack: SkillPack) -> list[str]:
    """What of the base is not in the result: what a lossless pack says, else a head that the base stores as a copy
    of the embedding, for it would be the old embedding's."""
    if pack.lossless:
        said = pack.options.get(ABSENT)
        return [name for name in base.tensors if isinstance(said, list) and name in said]
    head = tied_copy(base)
    return [head] if head is not None and head not in pack.tensors else []


def _config(
    base: Checkpoint, pack: SkillPack, dropped: Collection[str]
) -> tuple[dict[str, Any], list[str]]:
    """config.json as the result needs it, and what was adjusted."""
    config, notes = copy.deepcopy(base.config), []
    if travelled := pack.files.get("config.json"):
        config = with_settings(config, parse(travelled.content()))
    names = {**base.tensors, **pack.tensors}
    embedding, head = embedding_and_head(names)
    if embedding in pack.grown:
        rows = pack.tensors[embedding].shape[0]
        _set(config, "vocab_size", rows)
        notes.append(f"vocab_size is now {rows}.")
    if pack.lossless:
        if isinstance(ties := pack.options.get(TIES), bool) and ties != tied(config):
            _set(config, TIES, ties)
            notes.append(f"{TIES} is now {str(ties).lower()}, as in the tuned model.")
        return config, notes
    if head in pack.tensors and tied(config) is not False:
        _set(config, "tie_word_embeddings", False)
        notes.append(f"{head} has weights of its own; tie_word_embeddings is now false.")
    for name in dropped:
        _set(config, "tie_word_embeddings", True)
        notes.append(f"{name} repeats the embedding in the base; it is left out as tied.")
    return config, notes


def _kept_in(config: dict[str, Any], base: Checkpoint, specs: Specs) -> list[str]:
    """Let a config name the dtype of most of a lossless result, in which transformers loads it all."""
    sizes: dict[torch.dtype, int] = {}
    for dtype, shape in specs.values():
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + prod(shape) * dtype.itemsize
    most = max(sizes, key=lambda dtype: sizes[dtype], default=base.dtype)
    if most == base.dtype:
        return []
    told, notes = str(most)[6:], []
    for key in ("dtype", "torch_dtype"):
        if key in config or key in (config.get("text_config") or {}):
            _set(config, key, told)
            notes = [f"{key} is now {told}, as in the tuned model."]
    return notes


def _set(config: dict[str, Any], key: str, value: object) -> None:
    """Set a key in the place that has it: multimodal configs keep those of their language model apart."""
    text = config.get("text_config")
    if isinstance(text, dict) and key in text:
        text[key] = value
    if key in config or not (isinstance(text, dict) and key in text):
        config[key] = value


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Name a dtype wherever a config does, also within: transformers loads a model in it."""
    for key, value in config.items():
        if isinstance(value, dict):
            _set_dtype(value, dtype)
        elif key in ("dtype", "torch_dtype") and value is not None:
            config[key] = dtype


def _told(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else f"of shape {shape}"
