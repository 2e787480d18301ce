"""Packs that answer together, each in a forward pass of its own: the mean of their next-token probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.attach import Attached


class Ensemble:
    """Makes `model`, which is the base, answer as its members together, until `detach` or the `with` is left.

    members: the packs of each, whose deltas are summed. A batch is read once for each member, side by side with the
    base's weights (`Attached`), and so are its cached keys and values; the logits (prompts, tokens, vocabulary) that
    come out are the logarithm of the members' mean probabilities, float32, so that `generate` and whatever scores
    logits need not know. Raises as `Attached`.
    """

    def __init__(self, model: nn.Module, members: Sequence[Sequence[SkillPack]]):
        self.model = model
        every = [pack for packs in members for pack in packs]
        ends = [sum(map(len, members[: k + 1])) for k in range(len(members))]
        self._choices = [
            tuple(range(end - len(packs), end)) for end, packs in zip(ends, members, strict=True)
        ]
        self._attached = Attached(model, every)
        plain, self._own = model.forward, model.__dict__.get("forward")

        @wraps(plain)  # `generate` reads the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._together(plain, args, kwargs)

        model.__dict__["forward"] = forward

    def detach(self) -> None:
        """Take the packs off: the model is the base."""
        self.model.__dict__.pop("forward", None)
        if self._own is not None:  # of a model that is spread
            self.model.__dict__["forward"] = self._own
        self._attached.detach()

    def __enter__(self) -> Ensemble:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def _together(self, plain: Any, args: Any, kwargs: Any) -> Any:
        """The output on the batch, repeated for each member, with one row of logits a sample."""
        many = len(self._choices)
        told = {k: v for k, v in kwargs.items() if k != "past_key_values"}  # of all rows already
        given = [x for x in (*args, *told.values()) if isinstance(x, Tensor) and x.ndim > 1]
        count = len(given[0])

        def repeated(x: Any) -> Any:
            mine = isinstance(x, Tensor) and x.ndim > 1 and len(x) == count
            return x.repeat(many, *[1] * (x.ndim - 1)) if mine else x

        args, told = tree_map(repeated, (args, told))
        self._attached.choose([choice for choice in self._choices for _ in range(count)])
        try:
            output = plain(*args, **kwargs | told)
        finally:
            self._attached.choose(None)
        each = output.logits.float().log_softmax(-1).view(many, count, *output.logits.shape[1:])
        output.logits = each.logsumexp(0) - torch.tensor(float(many)).log()
        return output
