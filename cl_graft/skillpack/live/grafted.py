"""Putting packs on a base model and taking them off again."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from cl_graft.models.spread import Offloaded, offloaded
from cl_graft.skillpack import rounding
from cl_graft.skillpack.codecs import is_factored, is_scattered, kept_dtype, rank_of
from cl_graft.skillpack.format.file import (
    CorruptPack,
    NoDelta,
    NonFinite,
    ShapeMismatch,
    SkillPack,
    WrongBase,
    fingerprint,
)
from cl_graft.skillpack.live.decode import Entries, Factors, entries, factors, side_by_side
from cl_graft.skillpack.memory import release

TILE = 1 << 22  # entries of a product held at a time: more take new pages from the system each time


class Grafted:
    """A base model with exactly the packs named: weights = base + the sum of their deltas.

    The model given is the base, and it is changed in place. Parameters go by the names of
    `model.named_parameters()`, where tied ones appear once. Only parameters that a pack has touched are
    copied, into memory that is kept for the next packs. Nothing else may write to the model's parameters
    while packs are active. Of a model that is spread (models/spread.py) an offloaded parameter is not written to:
    base plus deltas takes its place in host memory, and is made anew each time it is asked for where the base's is
    in a file.

    base_weights: {name: the base's parameter}, if somebody holds or can read them: they are asked for whenever they are
    needed and never written to, so that no copy is made here.
    """

    def __init__(self, model: nn.Module, base_weights: Mapping[str, Tensor] | None = None):
        self.model = model
        self.active: tuple[SkillPack, ...] = ()
        self._held = base_weights
        self._changed, self._copies = set[str](), dict[str, Tensor]()
        self._rooms: dict[str, Tensor] = {}
        self._away, self._replaced = offloaded(model), set[str]()
        self._base: str | None = None

    @property
    def base(self) -> str:
        """The fingerprint of the base's parameters, computed once."""
        if self._base is None:
            self._base = fingerprint(self._of_base())
        return self._base

    def _of_base(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if name in self._away:
                yield name, self._away.base(name)
            else:
                yield name, self._pristine(name) if name in self._changed else parameter

    def _pristine(self, name: str) -> Tensor:
        """The base's value of a parameter that was changed."""
        return self._copies[name] if self._held is None else self._held[name]

    def activate(self, packs: Sequence[SkillPack]) -> None:
        """Make `packs` the active ones; those active before are off.

        Weights are the untouched base plus the packs' deltas, summed in float32 and rounded once: each
        `SkillPack.delta`, but the product of its factors where it is low-rank (see `put_low_rank`). In
        bfloat16 and float16 they are rounded stochastically (rounding.py), seeded by the base and by the
        tasks of the packs that touch the parameter, in order: the same packs give the same bits every
        time, in either layout. A lossless pack, which must be alone, gives the tuned weights' own. Raises
        WrongBase, ShapeMismatch or NoDelta before anything changes; on any other error (NonFinite: a
        weight overflows) the model is the base again.
        """
        packs = tuple(packs)
        if packs and [p.digest for p in packs] == [p.digest for p in self.active]:
            return
        parameters = dict(self.model.named_parameters())
        check_packs(packs, self.base, {n: tuple(p.shape) for n, p in parameters.items()})
        _check_kept(packs, parameters)
        touched = {name for pack in packs for name in pack.tensors}
        try:
            for name in (self._changed | self._replaced) - touched:
                self._restore(name, parameters[name])
            for name in sorted(touched):
                self._graft(name, parameters[name], packs)
        except BaseException:
            self.unload()
            raise
        self.active = packs
        self._read()

    def unload(self) -> None:
        """Take every pack off; the base is back bit for bit."""
        parameters = dict(self.model.named_parameters())
        for name in [*self._changed, *self._replaced]:
            self._restore(name, parameters[name])
        self.active = ()
        self._read()

    def _read(self) -> None:
        """What the base was read into is given back: its tensors are of many sizes."""
        if self._held is not None:
            release()

    @torch.no_grad()
    def _graft(self, name: str, parameter: Tensor, packs: tuple[SkillPack, ...]) -> None:
        packs = tuple(pack for pack in packs if name in pack.tensors)
        if name in self._away:
            self._replaced.add(name)
            return _replace(self._away, name, parameter, packs)
        if self._held is None and name not in self._changed:
            self._copies[name] = self._copied(name, parameter)
        self._changed.add(name)
        _put(parameter, self._pristine(name), name, packs)
        return None

    def _copied(self, name: str, parameter: Tensor) -> Tensor:
        """A copy of the base's parameter, in memory that has held one before if any has: new pages take longer."""
        room = self._rooms.get(name)
        if room is None or (room.dtype, room.device) != (parameter.dtype, parameter.device):
            room = self._rooms[name] = torch.empty_like(parameter)
        return room.copy_(parameter)

    @torch.no_grad()
    def _restore(self, name: str, parameter: Tensor) -> None:
        if name in self._replaced:
            self._away.restore(name)
            self._replaced.remove(name)
        else:
            parameter.copy_(self._pristine(name))
            self._changed.remove(name)
            self._copies.pop(name, None)


def _replace(held: Offloaded, name: str, parameter: Tensor, packs: tuple[SkillPack, ...]) -> None:
    """Have an offloaded parameter be base plus deltas, summed where its module runs. Raises NonFinite."""

    @torch.no_grad()
    def make() -> Tensor:
        base = held.base(name).to(held.device(name, parameter), parameter.dtype)
        weight = torch.empty_like(base)
        _put(weight, base, name, packs)
        return weight

    made = make()  # also tells whether it is finite
    if held.in_memory(name):
        kept = made.to("cpu")
        held.put(name, lambda: kept)
    else:
        held.put(name, make)


def _put(weight: Tensor, base: Tensor, name: str, packs: Sequence[SkillPack]) -> None:
    """weight = base under these packs, all of which touch it. Raises NonFinite where a part of it is not."""
    if kept_dtype(packs[0].tensors[name]) is not None:  # of a lossless pack, which is alone
        weight.copy_(packs[0].tuned(name, base))
        finite = rounding.all_finite(weight)
    else:
        every = [x for pack in packs for x in changes(pack, name, weight.dtype, weight.device)]
        finite = put(weight, base, every, seed_of(packs, name))
    if not finite:
        tasks = ", ".join(repr(pack.task) for pack in packs)
        raise NonFinite(f"parameter {name!r} overflows {weight.dtype} under {tasks}; use fewer.")


Change = Factors | Entries | Tensor


def changes(pack: SkillPack, name: str, dtype: torch.dtype, device: torch.device) -> list[Change]:
    """The delta of a parameter of this dtype as it is best added: factors and entries, where it is stored as such, or
    all of it, float32; on the device.

    The factors for a bfloat16 parameter are bfloat16 where they are multiplied as such. Raises CorruptPack where a
    tensor's parts do not fit its codec, NonFinite as `SkillPack.delta`.
    """
    encoded = pack.tensors[name]
    found: list[Change] = []
    try:
        # without a rank there are entries alone
        if is_factored(encoded) and (rank_of(encoded) or not is_scattered(encoded)):
            narrow = dtype == torch.bfloat16
            found.append(factors([encoded], torch.bfloat16 if narrow else torch.float32))
        if is_scattered(encoded):
            found.append(entries(encoded))
    except ValueError as error:
        raise CorruptPack(f"tensor {name!r} of task {pack.task!r}: {error}") from error
    return [each.to(device) for each in found or [pack.delta(name)]]


def seed_of(packs: Sequence[SkillPack], name: str) -> int:
    """The seed of a parameter's rounding under these packs, all of which touch it."""
    return rounding.seed_of([packs[0].base, *(pack.task for pack in packs)], name)


def put(weight: Tensor, base: Tensor, changes: Sequence[Change], seed: int) -> bool:
    """weight = base + the sum of the changes, rounded once; whether all of it is finite.

    base: of weight's shape, and no part of its memory. seed: `seed_of`. Low-rank changes are one product: see
    `put_low_rank`. A sum is float32, or of weight's wider dtype, and is rounded as `rounding.stochastic` does.
    """
    if (base.dtype, base.device) != (weight.dtype, weight.device):
        base = base.to(weight.device, weight.dtype)
    low = [each for each in changes if isinstance(each, Factors)]
    sparse = [each for each in changes if isinstance(each, Entries)]
    if low and len(low) + len(sparse) == len(changes):
        return put_low_rank(weight, base, side_by_side(low), seed, sparse)
    if len(changes) == len(sparse) == 1:
        return put_sparse(weight, base, sparse[0], seed)
    delta = torch.zeros(weight.shape, device=weight.device)
    for each in changes:
        if isinstance(each, Factors):
            delta.addmm_(each.left.float(), each.right.float())
        elif isinstance(each, Entries):
            delta.view(-1)[each.positions] += each.values.float()
        else:
            delta += each
    return rounding.total(base, delta, weight, seed)


def put_low_rank(
    weight: Tensor, base: Tensor, pair: Factors, seed: int, sparse: Sequence[Entries] = ()
) -> bool:
    """weight (rows, cols) = base + left @ right + entries, at the speed of the product; whether all of it is finite.

    Where the factors are bfloat16, stand alone, and the CPU multiplies such, so is the product: each is rounded once
    (2**-8 of it at most), and so a delta's entry is within 2**-7 * sum_r |left| |right| of the reference. The sum with
    the base is rounded as `rounding.total` does, which is many times as much. Other factors and their product are
    float32, and a float32 weight is what the product is summed up in: a rounding, 2**-24 of the weight, every few
    hundred ranks.
    """
    left, right = pair
    if left.dtype == torch.bfloat16 and (sparse or not _multiplied(left)):
        left, right = left.float(), right.float()
    step = max(4, TILE // max(1, len(right.T)) // 4 * 4)
    wide = weight.dtype == right.dtype == torch.float32
    room = right.new_empty(0 if wide else min(step, len(weight)), right.shape[1])
    finite, first = True, 0
    tiles = [x.split(step) for x in (weight, base, left)]
    for part, old, factor in zip(*tiles, strict=True):
        if wide:
            part.copy_(old).addmm_(factor, right)
            _scatter(part, sparse, first)
            finite &= rounding.all_finite(part)
        else:
            product = torch.mm(factor, right, out=room[: len(part)])
            _scatter(product, sparse, first)
            finite &= rounding.total(old, product, part, seed, first)
        first += part.numel()
    return finite


def _scatter(rows: Tensor, sparse: Sequence[Entries], first: int) -> None:
    """Add entries to rows of a matrix, (n, cols). first: row-major position of the first."""
    for positions, values in sparse:
        ends = torch.tensor([first, first + rows.numel()], device=positions.device)
        mine = slice(*torch.searchsorted(positions, ends).tolist())
        at, cols = positions[mine] - first, rows.shape[1]
        if len(at):
            rows[at // cols, at % cols] += values[mine].to(rows.dtype)


def put_sparse(weight: Tensor, base: Tensor, change: Entries, seed: int) -> bool:
    """weight = base, and the values added at their positions; whether those are finite. The base is taken to be."""
    weight.copy_(base)
    flat = weight.view(-1)
    there = flat[change.positions]
    rounding.add(there, change.values.float(), seed, change.positions)
    flat[change.positions] = there
    return rounding.all_finite(there)


def _multiplied(x: Tensor) -> bool:
    """Whether the device multiplies bfloat16 matrices."""
    return x.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def check_packs(
    packs: Sequence[SkillPack], base: str, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise WrongBase or ShapeMismatch unless all packs fit parameters of these shapes.

    base: their fingerprint. shapes: by name. What a pack holds besides weights, a live model does not
    take: a warning says so.
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
        if pack.files:
            warnings.warn(
                f"the pack of task {pack.task!r} also holds {', '.join(sorted(pack.files))}, which a live "
                "model does not take; `cl-graft pack apply` writes them beside the weights.",
                stacklevel=3,
            )
        for name, shape in pack.shapes.items():
            if shapes.get(name) != shape:
                there = f"shape {shapes[name]}" if name in shapes else "no such parameter"
                raise ShapeMismatch(
                    f"tensor {name!r} of task {pack.task!r} has shape {shape}, but the "
                    f"model has {there}; load the base it was made on."
                )


def _check_kept(packs: Sequence[SkillPack], parameters: Mapping[str, Tensor]) -> None:
    """Raise NoDelta for a lossless pack that is not alone, WrongBase where a parameter cannot hold what it keeps."""
    if len(packs) > 1:
        return check_deltas(packs)
    for pack in packs:
        for name, encoded in pack.tensors.items() if pack.lossless else ():
            kept, own = kept_dtype(encoded), parameters[name].dtype
            if kept is not None and torch.promote_types(kept, own) != own:
                raise WrongBase(
                    f"tensor {name!r} of task {pack.task!r} is kept in {kept}, bit for bit, which a "
                    f"parameter in {own} cannot hold; load the base in {kept}."
                )


def check_deltas(packs: Sequence[SkillPack]) -> None:
    """Raise NoDelta where a pack is lossless: nothing can be summed with it, or made of it."""
    for pack in packs:
        if pack.lossless:
            raise NoDelta(
                f"the pack of task {pack.task!r} keeps tuned weights bit for bit and no delta that could be added to "
                "others or attached; put it alone on its base by Grafted or by `cl-graft pack apply`."
            )
