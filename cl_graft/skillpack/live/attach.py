"""Packs beside a base model: its weights stay as they are, and each sample of a batch has its own packs.

A low-rank delta of a linear layer is added to the layer's output, y += (x right^T) left^T (LoRA, Hu et al. 2022,
unmerged; sums in 16 bits are rounded by `rounding.dithered`), and so is one in a few rows of its weight, or the sum of
both, as of a head. Every other delta is in the weights for as long as one call of a module takes, once for each
distinct choice in the batch, on the rows of its samples. attachment_points.py says at which modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cl_graft.models.spread import named_weights, offloaded
from cl_graft.skillpack import rounding
from cl_graft.skillpack.codecs import is_factored, is_scattered
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.attachment_points import (
    AttachError,
    AttachmentPoint,
    find_attachment_points,
)
from cl_graft.skillpack.live.decode import Entries, Factors, Rows
from cl_graft.skillpack.live.grafted import Change, changes, check_deltas, check_packs, put, seed_of

Held = list[Factors | Entries | Rows]
Choice = tuple[int, ...]
Choices = int | None | Choice | list[int | None | Choice]


class Attached:
    """Packs attached to `model`, none chosen at first; inference only. `detach`, or leave the `with`.

    packs: what `choose` numbers from 0. example: keyword arguments of one forward of several samples,
    for the trial run; by default three samples of two input_ids. Raises WrongBase or ShapeMismatch as
    `Grafted` does, NoDelta for a lossless pack, AttachError where samples cannot be told apart where a
    parameter is read. Memory is that of the packs' factors and of what is added in rows, in the model's
    dtype (float32 for float16), and of the other deltas as stored. Meanwhile nothing else may write to the
    parameters or replace a `forward`.
    """

    def __init__(
        self,
        model: nn.Module,
        packs: Sequence[SkillPack],
        example: Mapping[str, Any] | None = None,
    ):
        self.model, self.packs = model, tuple(packs)
        self._parameters = dict(model.named_parameters())
        self._away = offloaded(model)
        base = fingerprint(named_weights(model))
        shapes = {name: tuple(p.shape) for name, p in self._parameters.items()}
        check_packs(self.packs, base, shapes)
        check_deltas(self.packs)
        touched = {n: p for n, p in self._parameters.items() if any(n in q.tensors for q in packs)}
        points = find_attachment_points(model, touched, example) if touched else []
        linear = {name for point in points for name in point.linear}
        self._held = [
            {n: held for n in q.tensors if (held := self._hold(q, n, n in linear))}
            for q in self.packs
        ]
        self._choices: tuple[Choice, ...] = ((),)
        self._batch: int | None = None
        check = model.register_forward_pre_hook(self._check_batch, with_kwargs=True)
        self._undo: list[Callable[[], object]] = [check.remove]
        for point in points:
            self._undo.append(self._replace_forward(point))

    def choose(self, choices: Choices, beams: int = 1) -> None:
        """The packs of the next batches: one entry for all samples, or a list of one for each.

        An entry is the index of a pack, None for the base, or a tuple of indices for the sum of their
        deltas. beams: rows a sample has in the batch, side by side, as `generate` with num_beams lays
        them out. Raises AttachError for an index that no pack has, or an empty list.
        """
        entries = choices if isinstance(choices, list) else [choices]
        if not entries or beams < 1:
            raise AttachError(f"{choices!r} with {beams} beams chooses nothing; list one a sample.")
        chosen = [self._choice(entry) for entry in entries]
        self._choices = tuple(choice for choice in chosen for _ in range(beams))
        self._batch = len(self._choices) if isinstance(choices, list) else None
        self._choices = self._choices if self._batch else self._choices[:1]

    def detach(self) -> None:
        """Take the packs off: the modules are what they were, hooks and all."""
        while self._undo:
            self._undo.pop()()

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _choice(self, entry: int | None | Choice) -> Choice:
        choice = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
        for index in choice:
            if type(index) is not int or not 0 <= index < len(self.packs):
                raise AttachError(
                    f"no pack has the index {index!r}; {len(self.packs)} are attached."
                )
        return choice

    def _check_batch(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.ndim > 1)
        first = next(given, None)
        if self._batch and first is not None and len(first) != self._batch:
            raise AttachError(
                f"the batch has {len(first)} samples, but packs were chosen for {self._batch}; "
                "choose one for each (and say how many beams), or one for all."
            )

    def _replace_forward(self, point: AttachmentPoint) -> Callable[[], object]:
        module, plain, own = (
            point.module,
            point.module.forward,
            point.module.__dict__.get("forward"),
        )

        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._serve(point, plain, args, kwargs)

        module.__dict__["forward"] = forward
        if own is None:
            return lambda: module.__dict__.pop("forward")
        return lambda: module.__dict__.update(forward=own)

    def _serve(
        self, point: AttachmentPoint, plain: Callable[..., Any], args: Any, kwargs: Any
    ) -> Any:
        """The module's output, each sample's with its packs."""
        if point.linear or point.rows:  # modules of one input
            device = self._device(next(iter(point.places)))
            args, kwargs = tuple(x.to(device) for x in (*args, *kwargs.values())), {}
        kinds = set(self._choices)
        added = {c: self._of(c, point, True) for c in kinds}
        swapped = {c: self._of(c, point, False) for c in kinds}
        heavy = [swapped[c] for c in self._choices]

        def run(choice: Choice, args: Any, kwargs: Any) -> Any:
            with self._weights(point, choice, args) as args:
                return plain(*args, **kwargs)

        one = len(set(heavy)) == 1
        out = run(heavy[0], args, kwargs) if one else self._apart(heavy, run, args, kwargs)
        for choice, rows in _rows([added[c] for c in self._choices]).items():
            if not choice:
                continue
            part = out[rows]
            # a delta is often under half the spacing of 16 bits around an output, which is on their grid
            sums = part.float() if (narrow := out.dtype in rounding.NARROW) else part
            for index in choice:
                for name in point.linear:
                    for each in self._held[index][name]:
                        _add(sums, args[0][rows], each, point.transposed)
            out[rows] = rounding.dithered(sums, out.dtype) if narrow else sums
        return out

    def _of(self, choice: Choice, point: AttachmentPoint, light: bool) -> Choice:
        """The packs of a choice that matter to this point: to be added to its output, or to weights."""
        touched = {k: point.places.keys() & self.packs[k].tensors.keys() for k in choice}
        return tuple(
            k for k in choice if any(self._added(k, n, point) == light for n in touched[k])
        )

    def _base(self, name: str) -> Tensor:
        """The parameter of the base, where its module runs."""
        parameter = self._parameters[name].detach()
        if name in self._away:
            return self._away.base(name).to(self._device(name), parameter.dtype)
        return parameter

    def _device(self, name: str) -> torch.device:
        return self._away.device(name, self._parameters[name])

    def _hold(self, pack: SkillPack, name: str, linear: bool) -> Held:
        """What is worth keeping decoded of a delta: factors, and positions with values or the rows that have any."""
        encoded, parameter = pack.tensors[name], self._parameters[name]
        if not (is_factored(encoded) or is_scattered(encoded)):
            return []
        held: Held = []
        for each in changes(pack, name, parameter.dtype, self._device(name)):
            if isinstance(each, Factors):
                held.append(each)
            elif isinstance(each, Entries):
                held.append(_in_rows(each, parameter, bool(held)) if linear else each)
        return held

    def _added(self, index: int, name: str, point: AttachmentPoint) -> bool:
        held = self._held[index].get(name, ())
        return name in point.linear and bool(held) and not any(isinstance(x, Entries) for x in held)

    def _apart(self, choices: list[Choice], run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """run(choice, ...) on the rows of each choice, the rows of what comes out back in place."""
        count, whole, parts = len(choices), self._choices, []
        for choice, rows in _rows(choices).items():
            self._choices = tuple(whole[row] for row in rows)  # for the points within this one

            def take(x: Any, rows: list[int] = rows) -> Any:
                batch = isinstance(x, Tensor) and x.ndim > 1 and len(x) == count
                return x[rows] if batch else x

            try:
                parts.append((rows, run(choice, *tree_map(take, (args, kwargs)))))
            finally:
                self._choices = whole

        def join(*pieces: Tensor) -> Tensor:
            out = pieces[0].new_empty(count, *pieces[0].shape[1:])
            for (rows, _), piece in zip(parts, pieces, strict=True):
                out[rows] = piece  # a single row, as of positions, is every sample's
            return out

        return tree_map(join, *(part for _, part in parts))

    @contextmanager
    def _weights(self, point: AttachmentPoint, choice: Choice, args: Any) -> Iterator[Any]:
        """Put base plus the packs' deltas where the point reads them, within. Yields what to call it with."""
        before = [(m, n, m._parameters[n]) for ps in point.places.values() for m, n in ps]
        padding = getattr(point.module, "padding_idx", None)
        try:
            for name, places in point.places.items():
                packs = [k for k in choice if name in self.packs[k].tensors]
                packs = [k for k in packs if not self._added(k, name, point)]
                if not packs:
                    continue
                if name in point.rows:
                    ids, inverse = args[0].unique(return_inverse=True)
                    weight, args = self._looked_up(name, packs, ids), (inverse, *args[1:])
                    point.module.padding_idx = None  # type: ignore[assignment]  # a row of the base
                else:
                    weight = self._merged(name, packs)
                for module, own in places:
                    module._parameters[own] = weight  # type: ignore[assignment]
            yield args
        finally:
            for module, own, parameter in before:
                module._parameters[own] = parameter
            if point.rows:
                point.module.padding_idx = padding  # type: ignore[assignment]

    @torch.no_grad()
    def _merged(self, name: str, packs: list[int]) -> Tensor:
        """The parameter under these packs, with the very bits that `Grafted` gives it."""
        base = self._base(name)
        weight, touching = torch.empty_like(base), [self.packs[k] for k in packs]
        every: list[Change] = []
        for k in packs:
            own = self._held[k].get(name)
            held = own or changes(self.packs[k], name, base.dtype, base.device)
            every += [x.entries() if isinstance(x, Rows) else x for x in held]
        put(weight, base, every, seed_of(touching, name))
        return weight

    @torch.no_grad()
    def _looked_up(self, name: str, packs: list[int], ids: Tensor) -> Tensor:
        """Rows `ids` of a table under these packs, summed in float32 and rounded as `Grafted` does."""
        base = self._base(name)[ids]
        delta = torch.zeros(base.shape, device=base.device)
        for index in packs:
            held = self._held[index].get(name)
            if not held:
                delta += self.packs[index].rows(name, ids.cpu()).to(base.device)
            for each in held or ():
                delta += each.rows(ids, base.shape[1])
        cols = base.shape[1]
        places = (ids * cols)[:, None] + torch.arange(cols, device=ids.device)
        rounding.add(base, delta, seed_of([self.packs[k] for k in packs], name), places)
        return base


def _in_rows(each: Entries, parameter: Tensor, beside_factors: bool) -> Entries | Rows:
    """A linear layer's entries, in rows that its input is multiplied by; as they are where most of its rows have some
    and no factors go with them: then they are merged as quickly, in less memory."""
    cols = parameter.shape[1]
    if beside_factors or 2 * len(each.touched(cols)) <= len(parameter):
        return each.laid(cols, torch.float32)
    return each


def _rows(choices: list[Choice]) -> dict[Choice, Any]:
    """{choice: its rows}; all of them, without an index, where there is but one."""
    if len(set(choices)) == 1:
        return {choices[0]: slice(None)}
    return {c: [i for i, other in enumerate(choices) if other == c] for c in dict.fromkeys(choices)}


def _add(out: Tensor, x: Tensor, held: Factors | Entries | Rows, transposed: bool) -> None:
    """out (..., out) += x (..., in) times the matrix that is held, or its transpose where it is (out, in)."""
    x = x.to(held[1].dtype)
    if isinstance(held, Rows) and not transposed:
        out.index_add_(-1, held.ids, (x @ held.values.T).to(out.dtype))
    elif isinstance(held, Rows):
        out += (x[..., held.ids] @ held.values).to(out.dtype)
    else:
        left, right = held if transposed else (held[1].T, held[0].T)
        out += (x @ left @ right).to(out.dtype)
