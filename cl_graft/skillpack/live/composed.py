"""A delta composed from packs, tensor by tensor, when it is asked for: no whole model is ever held.

What answers for a task need not be stored as such: a merged delta is made of every task's, a task's own of a shared
vector and a mask. Two compositions are the same where the digest of what they are made of is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import Encoded, dense
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import check_deltas

Make = Callable[..., Tensor]


class Deltas(Mapping[str, Tensor]):
    """{name: delta of a pack, float32, on the CPU}, decoded anew each time it is asked for."""

    def __init__(self, pack: SkillPack):
        self.pack = pack

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.pack.tensors:
            raise KeyError(name)
        return self.pack.delta(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.pack.tensors)

    def __len__(self) -> int:
        return len(self.pack.tensors)


class _Made(Mapping[str, Encoded]):
    """{name: what `make(name)` gives, dense in float32}; only the last one asked for is held."""

    def __init__(self, names: Sequence[str], make: Callable[[str], Tensor]):
        self.names, self.make = dict.fromkeys(names), make
        self.last: tuple[str, Encoded] | None = None

    def __getitem__(self, name: str) -> Encoded:
        if name not in self.names:
            raise KeyError(name)
        if self.last is None or self.last[0] != name:
            self.last = None  # before the next is made: two are never held together
            self.last = name, dense(self.make(name), torch.float32)
        return self.last[1]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class Composed(SkillPack):
    """A pack whose tensors are made of other packs' when they are asked for; `compose` makes one."""

    sizes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    made_of: str = ""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.sizes

    @property
    def lossless(self) -> bool:
        """No: what is composed is a delta."""
        return False

    @property
    def digest(self) -> str:  # type: ignore[override]
        """BLAKE2b (32 hex digits) of what makes it, its options, and the digests of what it is made of."""
        return self.made_of


def compose(
    make: Make, packs: Sequence[SkillPack], names: Mapping[str, tuple[int, ...]], **options: Any
) -> Composed:
    """The pack with the tensors `make(name, *packs, **options)`, float32, for every name.

    make: a module's function; with its options (plain JSON) and the packs' digests it tells compositions apart.
    names: {parameter: its shape}. The last pack says what task and base it is for. Raises NoDelta for a lossless pack.
    """
    check_deltas(packs)
    last = packs[-1]
    told = [make.__module__, make.__qualname__, options, [pack.digest for pack in packs]]
    return Composed(
        tensors=_Made(list(names), lambda name: make(name, *packs, **options)),  # type: ignore[arg-type]
        task=last.task,
        method=last.method,
        options=last.options,
        base=last.base,
        versions=last.versions,
        sizes=dict(names),
        made_of=blake2b(json.dumps(told, sort_keys=True).encode(), digest_size=16).hexdigest(),
    )


def blend(members: Sequence[Sequence[SkillPack]], weights: Sequence[float]) -> Composed:
    """The pack whose delta is the weighted sum of the members', each of which is the sum of its packs'."""
    packs = [pack for member in members for pack in member]
    shares = [w for w, member in zip(weights, members, strict=True) for _ in member]
    names = {name: shape for pack in packs for name, shape in pack.shapes.items()}
    return compose(_weighted, packs, names, weights=shares)


def _weighted(name: str, *packs: SkillPack, weights: Sequence[float]) -> Tensor:
    """The weighted sum of the packs' deltas of a parameter; of packs that do not touch it, nothing."""
    pairs = [(w, pack) for w, pack in zip(weights, packs, strict=True) if name in pack.tensors]
    total = torch.zeros(pairs[0][1].shapes[name])
    for weight, pack in pairs:
        total.add_(pack.delta(name), alpha=weight)
    return total
