"""Singular directions between measuring and encoding: how many are looked for, and which wait in the work store.

Their energies, a few numbers, are always kept. Directions are kept as far as DIRECTIONS_BYTES go; the others, and those
of a matrix that is to have more ranks than were looked for, are found a second time when the matrix is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import Protocol

import torch
from torch import Tensor

from cl_graft.skillpack.compress.calibrate import Use
from cl_graft.skillpack.compress.factorise import Spectrum, spectrum
from cl_graft.skillpack.compress.policy import Adaptive, Policy
from cl_graft.skillpack.compress.work_store import Item, WorkStore

RANK_BITS = 1.4  # that an entry of a rank takes on average, where bits are shared out by worth
FEWEST = 16  # directions that are looked for in any matrix
DIRECTIONS_BYTES = 1_000_000_000

Shapes = Mapping[str, tuple[int, ...]]


class Known(Protocol):
    """What calibration knows of a model: `calibrate.Moments`, or moments made anew whenever they are visited."""

    @property
    def reads(self) -> Mapping[str, str]:
        """Tensor -> the group that it reads; complete for a group from when it is visited."""

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """Mean squared gradients: see Moments."""

    def visit(self, use: Use, wanted: Callable[[str], bool]) -> None:
        """Call `use` with each wanted group and its moment, in the model's order and with the same bits every time."""

    def diagonal(self, name: str) -> Tensor | None:
        """Mean square of each input, as in Moments; known when all groups have been visited."""


def wanted_directions(matrices: Shapes, policy: Policy, limit: int) -> dict[str, int]:
    """How many directions of each matrix are looked for before there is a plan: as many as its share of all bytes
    holds; all of them where a policy counts ranks without regard to their worth."""
    density = limit / max(1, sum(map(prod, matrices.values())))
    found = {}
    for name, shape in matrices.items():
        ranks = ceil(density * prod(shape) / (sum(shape) * RANK_BITS / 8))
        few = isinstance(policy, Adaptive)
        found[name] = min(min(shape), max(FEWEST, ranks)) if few else min(shape)
    return found


def directions_bytes(matrices: Shapes, wanted: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the directions that wait in the work store, by matrix: the first ones that DIRECTIONS_BYTES hold."""
    kept, room = {}, DIRECTIONS_BYTES
    for name, shape in matrices.items():
        size = 4 * wanted[name] * min(shape)
        if size <= room:
            kept[name] = size
            room -= size
    return kept


@dataclass(frozen=True)
class Directions:
    """Directions of all matrices. matrices: their shapes. limit: bytes of the pack."""

    matrices: Shapes
    policy: Policy
    limit: int
    store: WorkStore
    device: torch.device

    @cached_property
    def wanted(self) -> dict[str, int]:
        return wanted_directions(self.matrices, self.policy, self.limit)

    @cached_property
    def kept(self) -> dict[str, int]:
        return directions_bytes(self.matrices, self.wanted)

    def found(self, name: str) -> bool:
        """Whether a matrix has been measured."""
        return f"energy/{name}" in self.store

    def energy(self, name: str) -> Tensor:
        """float64 (r,): what dropping each rank of a measured matrix costs in squared output error."""
        return self.store[f"energy/{name}"].tensors["energy"].cpu()

    def find(self, name: str, delta: Tensor, under: Tensor | None) -> Spectrum:
        """Measure a matrix (out, in) under a Hessian, or without one, and keep what is to be kept."""
        result = spectrum(delta, under, self.wanted[name])
        if name in self.kept:
            self.store[f"directions/{name}"] = Item({"basis": result.basis}, {"wide": result.wide})
        self.store[f"energy/{name}"] = Item({"energy": result.energy}, {})
        return result

    def take(self, name: str, delta: Tensor, under: Tensor | None, ranks: int) -> Spectrum:
        """Find again, or look for, at least so many directions of a measured matrix."""
        if f"directions/{name}" in self.store and ranks <= self.wanted[name]:
            tensors, about = self.store[f"directions/{name}"]
            return Spectrum(self.energy(name), tensors["basis"].to(self.device), about["wide"])
        return spectrum(delta, under, max(ranks, self.wanted[name]))

    def drop(self, name: str) -> None:
        """Give up the place of a matrix that is encoded."""
        if f"directions/{name}" in self.store:
            del self.store[f"directions/{name}"]
