"""Putting packs on a base model and taking them off again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cl_graft.skillpack.file import NonFinite, ShapeMismatch, SkillPack, WrongBase, fingerprint


class Grafted:
    """A base model with exactly the packs named: weights = base + the sum of their deltas.

    The model given is the base, and it is changed in place. Parameters go by the names of
    `model.named_parameters()`, where tied ones appear once. Only parameters that a pack touches are
    copied. Nothing else may write to the model's parameters while packs are active.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.active: tuple[SkillPack, ...] = ()
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

        Deltas are summed in the order of the packs and added to the untouched base in float32, then
        cast to the parameter's dtype. Raises WrongBase or ShapeMismatch before anything changes;
        on any other error (NonFinite: a weight overflows) the model is the base again.
        """
        packs = tuple(packs)
        self._check(packs)
        parameters = dict(self.model.named_parameters())
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
        base = self._pristine.setdefault(name, parameter.detach().clone())
        delta = torch.zeros(base.shape)
        for pack in packs:
            if name in pack.tensors:
                delta += pack.delta(name)
        exact = torch.promote_types(base.dtype, torch.float32)
        weight = (base.to(exact) + delta.to(base.device)).to(base.dtype)
        if not torch.isfinite(weight).all():
            tasks = ", ".join(repr(pack.task) for pack in packs)
            raise NonFinite(f"parameter {name!r} overflows {base.dtype} under {tasks}; use fewer.")
        parameter.copy_(weight)

    @torch.no_grad()
    def _restore(self, name: str, parameter: Tensor) -> None:
        parameter.copy_(self._pristine[name])
        del self._pristine[name]

    def _check(self, packs: tuple[SkillPack, ...]) -> None:
        shapes = {name: tuple(p.shape) for name, p in self.model.named_parameters()}
        for pack in packs:
            if pack.base != self.base:
                raise WrongBase(
                    f"the pack of task {pack.task!r} is for base {pack.base!r}, but the model is "
                    f"{self.base!r}; load the base it was made on."
                )
            for name, encoded in pack.tensors.items():
                if shapes.get(name) != encoded.shape:
                    there = f"shape {shapes[name]}" if name in shapes else "no such parameter"
                    raise ShapeMismatch(
                        f"tensor {name!r} of task {pack.task!r} has shape {encoded.shape}, but the "
                        f"model has {there}; load the base it was made on."
                    )
