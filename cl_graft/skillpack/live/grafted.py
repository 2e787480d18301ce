"""Putting packs on a base model and taking them off again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from cl_graft.skillpack import rounding
from cl_graft.skillpack.codecs import is_factored, is_scattered
from cl_graft.skillpack.format.file import (
    CorruptPack,
    NonFinite,
    ShapeMismatch,
    SkillPack,
    WrongBase,
    fingerprint,
)
from cl_graft.skillpack.live.decode import entries, factors

TILE = 2048  # rows of a product held in float32 at a time

Pair = TypeVar("Pair", bound=tuple[Tensor, Tensor])


class Grafted:
    """A base model with exactly the packs named: weights = base + the sum of their deltas.

    The model given is the base, and it is changed in place. Parameters go by the names of
    `model.named_parameters()`, where tied ones appear once. Only parameters that a pack touches are
    copied. Nothing else may write to the model's parameters while packs are active.

    base_weights: {name: the base's parameter}, if somebody holds them already: they are read and never written to, so
    that the base is held once.
    """

    def __init__(self, model: nn.Module, base_weights: Mapping[str, Tensor] | None = None):
        self.model = model
        self.active: tuple[SkillPack, ...] = ()
        self._held = base_weights
        self._pristine: dict[str, Tensor] = {}
        self._base: str | None = None

    @property
    def base(self) -> str:
        """The fingerprint of the base's parameters, computed once."""
        if self._base is None:
            named = dict(self.model.named_parameters()) | self._pristine
            self._base = fingerprint(named.items())
        return self._base

    def activate(self, packs: Sequence[SkillPack]) -> None:
        """Make `packs` the active ones; those active before are off.

        Weights are the untouched base plus `SkillPack.delta` of each pack in turn, summed in float32
        and rounded once, but where all deltas of a parameter are low-rank: see `add_low_rank`. In
        bfloat16 and float16 they are rounded stochastically (rounding.py), seeded by the digests of
        the packs that touch the parameter, in order: the same packs give the same bits every time.
        Raises WrongBase or ShapeMismatch before anything changes; on any other error (NonFinite: a
        weight overflows) the model is the base again.
        """
        packs = tuple(packs)
        if packs and [p.digest for p in packs] == [p.digest for p in self.active]:
            return
        parameters = dict(self.model.named_parameters())
        check_packs(packs, self.base, {n: tuple(p.shape) for n, p in parameters.items()})
        touched = {name for pack in packs for name in pack.tensors}
        try:
            for name in self._pristine.keys() - touched:
                self._restore(name, parameters[name])
            for name in sorted(touched):
                self._graft(name, parameters[name], packs)
        except BaseException:
            self.unload()
            raise
        self.active = packs

    def unload(self) -> None:
        """Take every pack off; the base is back bit for bit."""
        parameters = dict(self.model.named_parameters())
        for name in list(self._pristine):
            self._restore(name, parameters[name])
        self.active = ()

    @torch.no_grad()
    def _graft(self, name: str, parameter: Tensor, packs: tuple[SkillPack, ...]) -> None:
        if name in self._pristine:
            parameter.copy_(self._pristine[name])
        else:
            held = self._held[name] if self._held else parameter.detach().clone()
            self._pristine[name] = held
        add(parameter, name, packs)
        if not _finite(parameter):
            tasks = ", ".join(repr(pack.task) for pack in packs)
            raise NonFinite(
                f"parameter {name!r} overflows {parameter.dtype} under {tasks}; use fewer."
            )

    @torch.no_grad()
    def _restore(self, name: str, parameter: Tensor) -> None:
        parameter.copy_(self._pristine[name])
        del self._pristine[name]


def add(weight: Tensor, name: str, packs: Sequence[SkillPack]) -> None:
    """weight, of the parameter `name`, += the sum of the packs' deltas, rounded once, by `rounding.add`.

    Raises CorruptPack where a tensor's parts do not fit its codec, NonFinite as `SkillPack.delta`.
    """
    packs = [pack for pack in packs if name in pack.tensors]
    if packs and all(is_factored(pack.tensors[name]) for pack in packs):
        return add_low_rank(weight, name, packs)
    if len(packs) == 1 and is_scattered(packs[0].tensors[name]):
        return add_sparse(weight, *_checked(entries, name, packs), seed_of(packs, name))
    delta = torch.zeros(weight.shape)
    for pack in packs:
        delta += pack.delta(name)
    seed, first = seed_of(packs, name), 0
    rows, changes = torch.atleast_1d(weight), torch.atleast_1d(delta.to(weight.device))
    for part, change in zip(rows.split(TILE), changes.split(TILE), strict=True):
        rounding.add(part, change, seed, first)
        first += part.numel()
    return None


def seed_of(packs: Sequence[SkillPack], name: str) -> int:
    """The seed of a parameter's rounding under these packs, all of which touch it."""
    return rounding.seed_of([pack.digest for pack in packs], name)


def add_low_rank(weight: Tensor, name: str, packs: Sequence[SkillPack]) -> None:
    """weight (rows, cols) += left @ right of all packs, one product, at the speed of the hardware.

    Where weight is bfloat16 and the CPU multiplies it, so are the factors and their product: each is rounded once
    (2**-8 of it at most), and so a delta's entry is within 2**-7 * sum_r |left| |right| of the reference. The sum
    with the weight is float32 and rounded as `rounding.add` does, which is many times as much. Other dtypes take
    float32 factors and product.
    """
    narrow = weight.dtype == torch.bfloat16
    dtype = torch.bfloat16 if narrow else torch.float32
    left, right = _checked(lambda *parts: factors(parts, dtype), name, packs)
    left, right = left.to(weight.device), right.to(weight.device)
    if not (
        narrow and weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    ):
        left, right = left.float(), right.float()
    room, seed = right.new_empty(min(TILE, len(weight)), right.shape[1]), seed_of(packs, name)
    first = 0
    for part, factor in zip(weight.split(TILE), left.split(TILE), strict=True):
        rounding.add(part, torch.mm(factor, right, out=room[: len(part)]), seed, first)
        first += part.numel()


def add_sparse(weight: Tensor, positions: Tensor, values: Tensor, seed: int) -> None:
    """weight += the values (kept,) at the positions (kept,), row-major; the others are not read. seed: `seed_of`."""
    positions = positions.to(weight.device)
    flat = weight.view(-1)
    there = flat[positions]
    rounding.add(there, values.to(weight.device).float(), seed, positions)
    flat[positions] = there


def _checked(decode: Callable[..., Pair], name: str, packs: Sequence[SkillPack]) -> Pair:
    try:
        return decode(*(pack.tensors[name] for pack in packs))
    except ValueError as error:
        tasks = ", ".join(repr(pack.task) for pack in packs)
        raise CorruptPack(f"tensor {name!r} of task {tasks}: {error}") from error


def check_packs(
    packs: Sequence[SkillPack], base: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise WrongBase or ShapeMismatch unless all packs fit parameters of these shapes.

    base: their fingerprint. shapes: by name.
    """
    for pack in packs:
        if pack.base != base:
            raise WrongBase(
                f"the pack of task {pack.task!r} is for base {pack.base!r}, but the model is "
                f"{base!r}; load the base it was made on."
            )
        if pack.added or pack.grown:
            raise ShapeMismatch(
                f"the pack of task {pack.task!r} has tensors or rows that the base lacks, and a live "
                "model has no place for them; apply it to a folder with `cl-graft pack apply`."
            )
        for name, shape in pack.shapes.items():
            if shapes.get(name) != shape:
                there = f"shape {shapes[name]}" if name in shapes else "no such parameter"
                raise ShapeMismatch(
                    f"tensor {name!r} of task {pack.task!r} has shape {shape}, but the "
                    f"model has {there}; load the base it was made on."
                )


def _finite(weight: Tensor) -> bool:
    """Whether no entry is NaN or infinite: where one is, so is the sum, which takes one fast pass."""
    return bool(torch.isfinite(weight.sum()) or torch.isfinite(weight).all())
