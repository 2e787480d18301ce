"""A base and a tuned checkpoint side by side: which tensors changed, and a policy for each oddity.

Whatever is not simply the difference of two tensors of one name and shape is either told in
`Pairing.notes` or refused; nothing is passed over in silence.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.models.meta_model import meta_model
from cl_graft.skillpack.folders.checkpoint import Checkpoint, Info
from cl_graft.skillpack.format.errors import NonFinite
from cl_graft.skillpack.rounding import all_finite

CHUNK = 1 << 22  # elements that are compared at a time
EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|tok_embeddings)\.weight$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$|^output\.weight$")
HEAD_BIAS = re.compile(r"(^|\.)(lm_head|embed_out)\.bias$")
BUFFER = re.compile(
    r"(^|\.)((original_)?inv_freq|(cos|sin)_cached|freqs_cis|position_ids|token_type_ids"
    r"|masked_bias|causal_mask|attention_mask|alibi)$"
)
LAYER = re.compile(r"(^|\.)(layers|h|blocks)\.\d+\.")
MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")  # GPT-2's and GPT-NeoX's, where 4-dimensional


class PairError(CLGraftError):
    """Two checkpoints whose difference makes no pack."""


class Change(NamedTuple):
    """A tensor that tuning changed; base_shape is None where the base has no such tensor.

    source: its name in the tuned checkpoint; another one only for a head that is tied there.
    """

    name: str
    shape: tuple[int, ...]
    base_shape: tuple[int, ...] | None
    source: str


@dataclass(frozen=True)
class Pairing:
    """changes: in the order of the tuned checkpoint. notes: a sentence for each policy applied."""

    base: Checkpoint
    tuned: Checkpoint
    changes: list[Change]
    notes: list[str]

    @property
    def added(self) -> list[str]:
        """Tensors that the base lacks; their delta is against zero."""
        return [change.name for change in self.changes if change.base_shape is None]

    @property
    def grown(self) -> dict[str, list[int]]:
        """{tensor whose number of rows changed: its shape in the base}."""
        both = [(c, c.base_shape) for c in self.changes if c.base_shape is not None]
        return {c.name: list(shape) for c, shape in both if shape != c.shape}

    def delta(self, name: str, part: int | None = None) -> Tensor:
        """Tuned minus base, float32, in the tuned shape; part: of a stack of matrices, that one alone.

        Both are widened first: a difference taken in bfloat16 loses small updates. float64 is
        subtracted in float64. An adapter's is its own. Rows that the base lacks count as zero. Raises UnknownName.
        """
        changes = {change.name: change for change in self.changes}
        if name not in changes:
            raise UnknownName("changed tensor", name, changes)
        change = changes[name]
        if (own := self.tuned.own_delta(self.base, name)) is not None:
            return own if part is None else own[part]
        tuned = _wide(self.tuned.read(change.source, part))
        if change.base_shape is None:
            return tuned.float()
        base = _wide(self.base.read(name, part))
        exact = torch.promote_types(tuned.dtype, base.dtype)
        tuned, base = tuned.to(exact), base.to(exact)
        add_rows(tuned, base, -1)
        return tuned.float()


def pair(base: Checkpoint, tuned: Checkpoint) -> Pairing:
    """Compare two checkpoints of one architecture; reads every tensor of both once.

    Raises PairError for a difference that no pack can hold, NonFinite for a weight with NaN or Inf.
    """
    notes = same_model(base, tuned)
    kinds = [
        " and ".join(sorted({str(side.tensors[n].dtype)[6:] for n in side.floating}))
        for side in (base, tuned)
    ]
    if kinds[0] != kinds[1]:
        notes.append(f"The base is in {kinds[0]}, the tuned in {kinds[1]}; both are widened first.")
    heads = _heads(base, tuned)
    notes += heads.notes
    check_complete(base, tuned, heads.left_out | heads.from_embedding.keys())
    buffers = {n for side in (base, tuned) for n, info in side.tensors.items() if _buffer(n, info)}
    notes += _buffers(base, tuned, buffers)
    changes, unchanged = [], 0
    for name in [*tuned.tensors, *heads.from_embedding]:
        if name in buffers or name in heads.left_out:
            continue
        change = change_of(base, tuned, name, heads.from_embedding.get(name, name))
        if _is_changed(base, tuned, change) or name in heads.kept:
            changes.append(change)
        else:
            unchanged += 1
    if unchanged:
        notes.append(f"{unchanged} of {unchanged + len(changes)} tensors are unchanged: left out.")
    pairing = Pairing(base, tuned, changes, notes)
    return Pairing(base, tuned, changes, notes + _sizes(pairing))


def add_rows(target: Tensor, other: Tensor, factor: int = 1) -> None:
    """target += factor * other, in place; where their numbers of rows differ, in the rows that both have."""
    if target.shape == other.shape:
        target.add_(other, alpha=factor)
    else:
        rows = min(len(target), len(other))
        target[:rows].add_(other[:rows], alpha=factor)


def embedding_and_head(names: Collection[str]) -> tuple[str | None, str | None]:
    """The names of the input embedding and of the output head among those of a checkpoint."""
    embedding = next((name for name in names if EMBEDDING.search(name)), None)
    return embedding, next((name for name in names if HEAD.search(name)), None)


def tied_copy(checkpoint: Checkpoint) -> str | None:
    """The head's name where it is stored although it only repeats the embedding, or None.

    A config that says nothing of ties is taken to tie where the two are equal.
    """
    embedding, head = embedding_and_head(checkpoint.tensors)
    if embedding is None or head is None or tied(checkpoint.config) is False:
        return None
    return head if _same(checkpoint, embedding, checkpoint, head) else None


def tied(config: dict[str, Any]) -> bool | None:
    """Whether a config ties head and embedding; None where it does not say."""
    return config.get("tie_word_embeddings", _text(config).get("tie_word_embeddings"))


# policies


def same_model(base: Checkpoint, tuned: Checkpoint) -> list[str]:
    """Notes on two checkpoints of one model. Raises PairError where they are not, or quantised."""
    for side in (base, tuned):
        floats = {side.tensors[name].dtype for name in side.floating}
        if "quantization_config" in side.config or any(d.itemsize == 1 for d in floats):
            raise PairError(
                f"{side.folder} is quantised; give the checkpoint in bfloat16 or float32 instead."
            )
    for key in ("model_type", "architectures"):
        ours, theirs = base.config.get(key), tuned.config.get(key)
        if ours != theirs and ours and theirs:
            raise PairError(
                f"{base.folder} is {_plain(ours)} and {tuned.folder} is {_plain(theirs)}; "
                "a pack needs a base and a model tuned from it."
            )
    return [*base.notes, *tuned.notes]


class _Heads(NamedTuple):
    """left_out: no change of its own. kept: a change even where zero. from_embedding: {head: E}."""

    left_out: set[str]
    kept: set[str]
    from_embedding: dict[str, str]
    notes: list[str]


def _heads(base: Checkpoint, tuned: Checkpoint) -> _Heads:
    """Output heads that are tied to the embedding on one side or on both."""
    nothing = _Heads(set(), set(), {}, [])
    embedding, head = embedding_and_head({**base.tensors, **tuned.tensors})
    if embedding is None or head is None or embedding not in base.tensors.keys() & tuned.tensors:
        return nothing
    copy = tied_copy(base) == head
    if head not in tuned.tensors:
        if tied(tuned.config) is False:
            return nothing
        if copy:
            note = f"{head} repeats the embedding in the base only: left out, tied in the result."
            return _Heads({head}, set(), {}, [note])
        note = f"{head} is tied to {embedding} in the tuned only: stored as a change of its own."
        return _Heads(set(), {head}, {head: embedding}, [note])
    if head in base.tensors and not copy:
        return nothing
    if _same(tuned, embedding, tuned, head):
        return _Heads({head}, set(), {}, [f"{head} repeats the embedding: left out, tied."])
    note = f"{head} is tied in the base only: stored; tie_word_embeddings becomes false."
    return _Heads(set(), {head}, {}, [note])


def check_complete(base: Checkpoint, tuned: Checkpoint, more: Collection[str]) -> None:
    """Raise PairError where the tuned lacks a tensor of the base that is neither a buffer nor one of `more`."""
    missing = [n for n in base.tensors if n not in tuned.tensors and n not in more]
    lost = [name for name in missing if not _buffer(name, base.tensors[name])]
    if lost and not base.tensors.keys() & tuned.tensors.keys():
        cure = "rename its tensors as the base's"
        if all(_loads(side) for side in (base, tuned)):
            cure = "load both with transformers and save them again"
        raise PairError(
            f"{tuned.folder} names no tensor as {base.folder} does ({next(iter(tuned.tensors))!r}, "
            f"{lost[0]!r}); {cure}."
        )
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise PairError(f"{tuned.folder} lacks {lost[0]!r}{more} of the base; complete it.")


def _loads(side: Checkpoint) -> bool:
    """Whether transformers finds every weight of its model, so that none would be made up."""
    try:
        return meta_model(side.folder).plain
    except CLGraftError:
        return False


def _buffers(base: Checkpoint, tuned: Checkpoint, buffers: set[str]) -> list[str]:
    """Tensors that a model computes itself; integers and booleans among them must not differ."""
    notes = []
    for what, names in (
        ("the tuned lacks", base.tensors.keys() - tuned.tensors.keys()),
        ("only the tuned has", tuned.tensors.keys() - base.tensors.keys()),
    ):
        if both := sorted(names & buffers):
            stay = "the base's stay" if what.endswith("lacks") else "left out"
            notes.append(f"{len(both)} buffers that {what} ({both[0]}, ...): {stay}.")
    differing = []
    for name in sorted(buffers & base.tensors.keys() & tuned.tensors.keys()):
        if not _same(base, name, tuned, name):
            if not tuned.tensors[name].dtype.is_floating_point:
                raise PairError(f"{name!r} holds integers that differ; a pack changes only floats.")
            differing.append(name)
    if differing:
        notes.append(f"{len(differing)} buffers differ ({differing[0]}, ...): the base's stay.")
    return notes


def change_of(base: Checkpoint, tuned: Checkpoint, name: str, source: str) -> Change:
    """The change of a tensor, whose values need not differ. Raises PairError where shapes or integers forbid one."""
    info, before = tuned.tensors[source], base.tensors.get(name)
    shape = before.shape if before else None
    if not (info.dtype.is_floating_point and (before is None or before.dtype.is_floating_point)):
        raise PairError(f"{name!r} holds integers on one side only; give checkpoints in floats.")
    if shape is not None and shape != info.shape:
        rows = any(kind.search(name) for kind in (EMBEDDING, HEAD, HEAD_BIAS))
        if not rows or len(shape) != len(info.shape) or shape[1:] != info.shape[1:]:
            raise PairError(
                f"{name!r} has shape {info.shape} in {tuned.folder}, but {shape} in {base.folder}; "
                "only embeddings and heads may differ, and only in their rows."
            )
    return Change(name, info.shape, shape, source)


def _sizes(pairing: Pairing) -> list[str]:
    added = pairing.added
    notes = [f"{name} is not in the base: stored as it is." for name in added[:1]]
    if len(added) > 1:
        notes = [f"{len(added)} tensors ({added[0]}, ...) are not in the base: stored as they are."]
    if any(LAYER.search(name) for name in added):
        notes.append(
            "Layers are compared by their number; a pack of fewer bytes is made on the model that training began from, "
            "with the new layers in their places."
        )
    rows = {change.name: change.shape[0] for change in pairing.changes}
    for name, shape in pairing.grown.items():
        verb = "new rows count from zero" if rows[name] > shape[0] else "surplus rows are cut"
        notes.append(f"{name} has {shape[0]} rows in the base, {rows[name]} tuned: {verb}.")
    return notes


def _buffer(name: str, info: Info) -> bool:
    mask = bool(MASK.search(name)) and len(info.shape) == 4
    return mask or bool(BUFFER.search(name)) or not info.dtype.is_floating_point


def _text(config: dict[str, Any]) -> dict[str, Any]:
    text = config.get("text_config")
    return text if isinstance(text, dict) else {}


def _plain(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _is_changed(base: Checkpoint, tuned: Checkpoint, change: Change) -> bool:
    """Whether any element differs in value. Raises NonFinite for either side."""
    after = tuned.read(change.source)
    check_finite(tuned, change.source, after)
    if change.base_shape is None:
        return True
    before = base.read(change.name)
    check_finite(base, change.name, before)
    return not _equal(before, after)


def check_finite(side: Checkpoint, name: str, tensor: Tensor) -> None:
    """Raise NonFinite where a checkpoint's tensor holds NaN or Inf."""
    if not all_finite(tensor):
        raise NonFinite(f"{name!r} of {side.folder} holds NaN or Inf; repair the checkpoint.")


def _same(one: Checkpoint, name: str, other: Checkpoint, its_name: str) -> bool:
    if one.tensors[name].shape != other.tensors[its_name].shape:
        return False
    return _equal(one.read(name), other.read(its_name))


def _equal(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and value, whatever the dtypes; a chunk at a time."""
    if a.shape != b.shape:
        return False
    wide = torch.promote_types(a.dtype, b.dtype)
    parts = zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True)
    return all(torch.equal(x.to(wide), y.to(wide)) for x, y in parts)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
