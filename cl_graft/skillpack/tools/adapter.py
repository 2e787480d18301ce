"""A pack as the factors of a LoRA adapter: which tensors fit, at which rank, and what is lost.

Of the layers that are linear in the model, low-rank codecs give their factors as they are; other codecs are cut to a
rank by their best approximation. Embedding and head go along where that is asked for: as factors, or as rows. A
table that is stored as factors changes in all rows, and all of them would be the table itself: those that change most
are written, as many as are no more numbers than the factors (and the rows of their own beside them) are. Everything
else of a pack has no place in an adapter and is told in the rows. LoRA: Hu et al. 2022. All modules have one rank,
which engines have room for (those of vLLM's max_lora_rank but 1), filled up with zeros, and alpha is that rank, so that
no reader needs to know patterns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

from cl_graft.models.meta_model import MetaModel, meta_model
from cl_graft.models.roles import UnclearRoles
from cl_graft.skillpack.codecs import Encoded, is_factored, is_scattered, rank_of
from cl_graft.skillpack.folders.apply import check_base
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.format.errors import SkillPackError
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.decode import entries, factors
from cl_graft.skillpack.live.grafted import check_deltas
from cl_graft.skillpack.tools.low_rank import Factors, best_factors, cut, padded

Tables = Literal["none", "lora", "rows"]
Kind = Literal["linear", "transposed", "embedding"]
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class NothingToExport(SkillPackError):
    """A pack without a linear layer, or a rank that leaves nothing."""


class Exported(NamedTuple):
    """One tensor of a pack: what became of it.

    rank: of what is kept of it, None where it was left out or is in rows. error: ||delta - exported|| / ||delta||, None
    where the delta is zero or left out. note: why it was left out, or what to beware of; else empty. lost, norm: the
    squares of both, lost the whole of what was left out.
    """

    name: str
    role: str
    codec: str
    rank: int | None
    error: float | None
    note: str
    lost: float
    norm: float

    @property
    def kept(self) -> bool:
        """Whether the adapter has it."""
        return not self.note.startswith("left out")


class Total(NamedTuple):
    """The tensors of a role, or all. error: relative, of those that are kept; missing: of all that the pack holds."""

    role: str
    tensors: int
    kept: int
    error: float | None
    missing: float | None


class Module(NamedTuple):
    """A layer of the model with a tensor of the pack. kind: "linear" (out, in), "transposed" as GPT-2's Conv1D (in,
    out), "embedding" (ids, width). rank: of its factors."""

    name: str
    tensor: str
    rank: int
    kind: Kind


@dataclass(frozen=True)
class Adapter:
    """modules: what is written as factors, one or two (of tied weights) a tensor. rank: of all of them. rows: tables
    whose changed rows are written, of tied ones the first. left_out: {tensor: why}."""

    pack: SkillPack
    base: Checkpoint
    meta: MetaModel
    modules: list[Module]
    rank: int
    rows: list[Module]
    left_out: dict[str, str]
    roles: dict[str, str]

    def factors(self, module: Module) -> tuple[Factors, Exported]:
        """The factors of a module's delta, (out, in) whatever its kind, of `rank`; and its row."""
        encoded, delta = self.pack.tensors[module.tensor], self.pack.delta(module.tensor)
        if is_factored(encoded) and not is_scattered(encoded):
            pair: Factors = factors([encoded])
            pair = cut(*pair, module.rank) if pair[0].shape[1] > module.rank else pair
        else:
            pair = best_factors(delta, module.rank)
        lost = float((delta - pair[0] @ pair[1]).square().sum())
        tied = sum(other.tensor == module.tensor for other in self.modules) > 1
        note = (
            "tied: for embedding and head, of which an engine may adapt one alone" if tied else ""
        )
        row = self.row(module.tensor, delta, lost, note, module.rank)
        left, right = padded(*pair, self.rank)
        return ((right.T, left.T) if module.kind != "linear" else (left, right)), row

    def changed(self, module: Module) -> Tensor:
        """Ids of the rows of a table that are written: int64, strictly increasing."""
        encoded, delta = self.pack.tensors[module.tensor], self.pack.delta(module.tensor)
        ids, stored = delta.any(1).nonzero().flatten(), ranks_and_rows(encoded)
        if stored is None:
            return ids
        (rank, own), (rows, cols) = stored, encoded.shape
        order = delta.square().sum(1)[ids].argsort(descending=True, stable=True)
        return ids[order[: own + rank * (rows + cols) // max(1, cols)]].sort().values

    def row(
        self, name: str, delta: Tensor, lost: float, note: str = "", rank: int | None = None
    ) -> Exported:
        """What to tell of a tensor. lost: the squared error of what is written."""
        norm = float(delta.square().sum())
        error = (lost / norm) ** 0.5 if norm and not note.startswith("left out") else None
        codec = self.pack.tensors[name].codec
        return Exported(name, self.roles[name], codec, rank, error, note, lost, norm)

    def told(self, rows: dict[str, Exported]) -> list[Exported]:
        """A row for each tensor of the pack, in its order: those given, and those left out."""
        for name, why in self.left_out.items():
            delta = self.pack.delta(name)
            rows[name] = self.row(name, delta, float(delta.square().sum()), f"left out: {why}")
        return [rows[name] for name in self.pack.tensors]


def adapter_of(
    pack: SkillPack,
    base_dir: str | os.PathLike[str],
    rank: int | None = None,
    tables: Tables = "none",
) -> Adapter:
    """Find what of a pack fits an adapter.

    rank: the most that any module gets; by default what a low-rank codec has, at most 512. tables: what becomes of the
    embedding and the head. Raises WrongBase, ShapeMismatch, NoDelta, NothingToExport, CheckpointError.
    """
    if rank is not None and rank < 1:
        raise NothingToExport(f"an adapter of rank {rank} holds nothing; give a rank of 1 or more.")
    check_deltas([pack])
    base = Checkpoint(base_dir)
    check_base(base, pack)
    meta, most = meta_model(base.folder), min(rank or RANKS[-1], RANKS[-1])
    roles = {name: _role(meta, name) for name in pack.tensors}
    modules: list[Module] = []
    rows: list[Module] = []
    left_out = {}
    parameters = dict(meta.model.named_parameters(remove_duplicate=False))
    for name in pack.tensors:
        found, why = _modules(pack, meta, parameters, name, most)
        table = roles[name] in ("embedding", "head")
        if not why and table and tables == "none":
            why = "an embedding or head; --embeddings takes it along"
        if why:
            left_out[name] = why
        else:
            modules += [] if table and tables == "rows" else found
            rows += found[:1] if table and tables == "rows" else []
    if not modules:
        raise NothingToExport(
            f"the pack of task {pack.task!r} changes no linear layer that an adapter could hold; "
            "export it to a folder (--to hf)."
        )
    largest = max(module.rank for module in modules)
    one = next(size for size in RANKS if size >= largest)
    return Adapter(pack, base, meta, modules, one, rows, left_out, roles)


def ranks_and_rows(encoded: Encoded) -> tuple[int, int] | None:
    """Ranks of a tensor's factors, and how many rows have entries beside them; None where it has no factors."""
    rank, both = rank_of(encoded), is_factored(encoded) and is_scattered(encoded)
    rows = len(entries(encoded).touched(encoded.shape[1])) if both else 0
    return None if rank is None else (rank, rows)


def totals(rows: list[Exported]) -> list[Total]:
    """Sum up rows by role, and all of them."""
    groups = {role: [row for row in rows if row.role == role] for role in {r.role for r in rows}}
    return [_total(role, groups[role]) for role in sorted(groups)] + [_total("all", rows)]


def _total(role: str, rows: list[Exported]) -> Total:
    kept = [row for row in rows if row.kept]
    shares = []
    for some in (kept, rows):
        norm = sum(row.norm for row in some)
        shares.append((sum(row.lost for row in some) / norm) ** 0.5 if norm else None)
    return Total(role, len(rows), len(kept), *shares)


# what fits


def _role(meta: MetaModel, name: str) -> str:
    try:
        return meta.role_of(name)
    except UnclearRoles:
        return ""


def _modules(
    pack: SkillPack, meta: MetaModel, parameters: dict[str, nn.Parameter], name: str, most: int
) -> tuple[list[Module], str]:
    """The layers whose weight is a tensor, or else why it has no place in an adapter."""
    from transformers.pytorch_utils import Conv1D

    encoded, parameter = pack.tensors[name], parameters.get(meta.parameter_of(name) or "")
    if name in pack.added:
        return [], "the base has no such tensor"
    if name in pack.grown:
        return [], "an adapter cannot change the number of rows"
    if len(encoded.shape) == 1:
        return [], "a norm or bias is no matrix"
    stored = ranks_and_rows(encoded)  # a row of its own is a rank more
    own = min([*encoded.shape, *([] if stored is None else [sum(stored)])], default=1)
    rank = max(1, min(own, most))
    kinds: dict[type[nn.Module], Kind] = {nn.Embedding: "embedding", Conv1D: "transposed"}
    kinds[nn.Linear] = "linear"
    found = []
    for inner in [n for n, other in parameters.items() if other is parameter]:
        owner = meta.model.get_submodule(inner.rpartition(".")[0])
        kind = next((kind for known, kind in kinds.items() if isinstance(owner, known)), None)
        if kind and parameter is not None and tuple(parameter.shape) == tuple(encoded.shape):
            found.append(Module(inner.removesuffix(".weight"), name, rank, kind))
    return found, "" if found else "not the weight of a linear layer"
