"""Two packs side by side: what each stores, and how alike their deltas are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import payload_bytes
from cl_graft.skillpack.folders.apply import check_base
from cl_graft.skillpack.folders.apply import delta as delta_of
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.folders.pair import Pairing
from cl_graft.skillpack.format.errors import ShapeMismatch
from cl_graft.skillpack.format.file import SkillPack

CHUNK = 1 << 22  # elements that are widened to float64 at a time
Where = Literal["both", "only in a", "only in b"]


class TensorComparison(NamedTuple):
    """One tensor, or the total of a role.

    cosine: of the two deltas, over all elements. difference: ||a - b|| / ||a||. None where a tensor
    is in one pack only, where shapes differ, and where a delta is zero and leaves it undefined; in
    a total, a delta that is missing counts as zero.
    """

    name: str
    role: str
    where: Where
    codec_a: str | None
    codec_b: str | None
    bytes_a: int
    bytes_b: int
    cosine: float | None
    difference: float | None


class Comparison(NamedTuple):
    """rows: by name. totals: by role, and over everything as "all" at the end."""

    same_base: bool
    rows: list[TensorComparison]
    totals: list[TensorComparison]


class _Products(NamedTuple):
    """<a, a>, <b, b>, <a, b> and <a - b, a - b>; the last has digits that the others lost."""

    aa: float
    bb: float
    ab: float
    dd: float


def compare(
    a: SkillPack,
    b: SkillPack,
    roles: Mapping[str, str] | None = None,
    base: Checkpoint | None = None,
) -> Comparison:
    """Compare two packs tensor by tensor; no more than one delta of each is decoded at a time.

    roles: {tensor: role}, for the totals; tensors without one are listed under "". base: of both, for
    lossless packs. Raises CorruptPack, NonFinite or NoDelta as `SkillPack.delta` does, WrongBase.
    """
    roles = roles or {}
    for pack in (a, b):
        if base is not None and pack.lossless:
            check_base(base, pack)
    rows, products = [], []
    for name in sorted(a.tensors.keys() | b.tensors.keys()):
        sums = _products(*_deltas(a, b, name, base))
        products.append(sums)
        rows.append(_row(name, roles.get(name, ""), a, b, sums))
    groups = sorted({row.role for row in rows} - {""})
    groups += [""] if groups and any(row.role == "" for row in rows) else []
    totals = [_total(role, role, rows, products) for role in groups]
    return Comparison(a.base == b.base, rows, [*totals, _total("all", None, rows, products)])


def _row(
    name: str, role: str, a: SkillPack, b: SkillPack, sums: _Products | None
) -> TensorComparison:
    one, other = a.tensors.get(name), b.tensors.get(name)
    where: Where = "only in b" if one is None else "only in a" if other is None else "both"
    return TensorComparison(
        name,
        role,
        where,
        one.codec if one else None,
        other.codec if other else None,
        payload_bytes(*one.spec) if one else 0,
        payload_bytes(*other.spec) if other else 0,
        *(_alike(sums) if sums and where == "both" else (None, None)),
    )


def _total(
    name: str, role: str | None, rows: list[TensorComparison], products: list[_Products | None]
) -> TensorComparison:
    """Sum up all rows of a role, or all rows for None."""
    chosen = [(r, p) for r, p in zip(rows, products, strict=True) if role in (None, r.role)]
    places = {row.where for row, _ in chosen}
    known = [p for _, p in chosen if p is not None]
    sums = _Products(*(sum(values) for values in zip(*known, strict=True))) if known else None
    comparable = sums is not None and len(known) == len(chosen)
    return TensorComparison(
        name,
        role or "",
        places.pop() if len(places) == 1 else "both",
        None,
        None,
        sum(row.bytes_a for row, _ in chosen),
        sum(row.bytes_b for row, _ in chosen),
        *(_alike(sums) if comparable and sums else (None, None)),
    )


def _deltas(
    a: SkillPack, b: SkillPack, name: str, base: Checkpoint | None
) -> tuple[Tensor, Tensor]:
    """Both deltas of a tensor that is in one of the packs; zero where a pack does not touch it."""
    shape = (a if name in a.tensors else b).tensors[name].shape

    def one(pack: SkillPack) -> Tensor:
        if name not in pack.tensors:
            return torch.zeros(shape)
        return pack.delta(name) if base is None else delta_of(base, pack, name)

    return one(a), one(b)


def _products(a: Tensor, b: Tensor) -> _Products | None:
    """The four products, in float64; None for two shapes that cannot be compared."""
    if a.shape != b.shape:
        return None
    sums = torch.zeros(4, dtype=torch.float64)
    for x, y in zip(a.reshape(-1).split(CHUNK), b.reshape(-1).split(CHUNK), strict=True):
        x, y = x.double(), y.double()
        sums += torch.stack([x @ x, y @ y, x @ y, (x - y) @ (x - y)])
    return _Products(*sums.tolist())


def _alike(p: _Products) -> tuple[float | None, float | None]:
    """Cosine and relative difference."""
    cosine = p.ab / (p.aa * p.bb) ** 0.5 if p.aa and p.bb else None
    return cosine, (p.dd / p.aa) ** 0.5 if p.aa else None


def missed(pack: SkillPack, pairing: Pairing) -> dict[str, tuple[float, float]]:
    """{changed tensor: (squared error of what the pack keeps, squared norm of its delta)}.

    One tensor of each checkpoint is held at a time. A tensor that the pack leaves out has all of it as error.
    """
    errors = {}
    for change in pairing.changes:
        delta = pairing.delta(change.name)
        kept = torch.zeros(delta.shape)
        if change.name in pack.tensors:
            kept = delta_of(pairing.base, pack, change.name)
        sums = _products(delta, kept)
        if sums is None:
            raise ShapeMismatch(
                f"tensor {change.name!r} has shape {tuple(kept.shape)} in the pack and {change.shape} in "
                f"{pairing.tuned.folder}; give the tuned checkpoint that the pack was made of."
            )
        errors[change.name] = (sums.dd, sums.aa)
    return errors
