"""What a base's 16-bit dtype leaves of a pack's delta, before it is applied: measured on rows of every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod, sqrt

import torch
from torch import Tensor

from cl_graft.skillpack import codecs
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.folders.checkpoint import Checkpoint
from cl_graft.skillpack.rounding import NARROW, seed_of, stochastic

ROWS = 256  # of a tensor that are looked at
WAYS = ("nearest", "stochastic")


@dataclass
class DtypeCost:
    """Sums over the tensors of a role, squares of norms; each tensor's sampled rows stand for all of them.

    weights, delta: of the base's weights and of the delta. kept: {way of rounding: product of what was added with the
    delta}. missed: {way: of what was added less the delta}.
    """

    role: str
    weights: float = 0.0
    delta: float = 0.0
    kept: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))
    missed: dict[str, float] = field(default_factory=lambda: dict.fromkeys(WAYS, 0.0))

    def row(self) -> dict[str, object]:
        """Ratios, for a table."""
        found: dict[str, object] = {
            "role": self.role,
            "delta / weights": _ratio(self.delta, self.weights),
        }
        for way in WAYS:
            found[f"{way}: kept"] = round(self.kept[way] / self.delta, 4) if self.delta else None
            found[f"{way}: error / delta"] = _ratio(self.missed[way], self.delta)
        return found


def dtype_costs(
    base: Checkpoint,
    tensors: Iterable[tuple[str, str, bool]],
    encoded: Callable[[str], Encoded],
) -> list[DtypeCost]:
    """What writing base + delta in the base's own dtypes costs, by role and over all ("all", the last).

    tensors: (name, role, whether it multiplies from the right) of what the pack holds; those that the base lacks or
    has in a wide dtype are passed over. One tensor of the base is read at a time.
    """
    costs: dict[str, DtypeCost] = {}
    for name, role, transposed in tensors:
        info = base.tensors.get(name)
        if info is None or info.dtype not in NARROW or not prod(info.shape):
            continue
        weight, delta, share = _rows(base.read(name), encoded(name), transposed)
        wanted = weight + delta
        written = {
            "nearest": wanted.to(info.dtype),
            "stochastic": stochastic(wanted, info.dtype, seed_of([], name)),
        }
        for cost in (costs.setdefault(kind, DtypeCost(kind)) for kind in (role, "all")):
            cost.weights += _square(weight) / share
            cost.delta += _square(delta) / share
            for way, rounded in written.items():
                added = rounded.float() - weight
                cost.kept[way] += float((added.double() * delta.double()).sum()) / share
                cost.missed[way] += _square(added - delta) / share
    every = costs.pop("all", None)
    return [*costs.values(), every] if every and every.delta else []


def told(costs: list[DtypeCost], dtype: torch.dtype) -> str:
    """The sentence for whoever made the pack."""
    row = costs[-1].row()
    return (
        f"In the base's {str(dtype).removeprefix('torch.')} rounding to nearest would keep "
        f"{row['nearest: kept']:.1%} of this delta. `cl-graft pack apply` rounds stochastically: that keeps "
        f"{row['stochastic: kept']:.1%}, with noise {row['stochastic: error / delta']} times its size that has no "
        "direction; --dtype float32 adds none."
    )


def _rows(weight: Tensor, encoded: Encoded, transposed: bool) -> tuple[Tensor, Tensor, float]:
    """Evenly spaced rows of base and delta, float32, and their share of all; of matrices as (out, in)."""
    weight = torch.atleast_1d(weight)
    transposed = transposed and len(encoded.shape) == 2
    both = min([len(weight), *encoded.shape[:1]])  # of a table that grew
    if transposed or len(encoded.shape) < 2:
        delta = torch.atleast_1d(codecs.decode(encoded))[:both]
        weight = weight[:both]
        weight, delta = (weight.T, delta.T) if transposed else (weight, delta)
        ids = torch.arange(0, len(weight), max(1, len(weight) // ROWS))
        return weight[ids].float(), delta[ids], len(ids) / len(weight)
    ids = torch.arange(0, both, max(1, both // ROWS))
    return weight[ids].float(), codecs.rows(encoded, ids), len(ids) / both


def _square(x: Tensor) -> float:
    """The square of the norm."""
    return float(x.double().square().sum())


def _ratio(part: float, whole: float) -> float | None:
    return float(f"{sqrt(max(0.0, part) / whole):.3g}") if whole else None
