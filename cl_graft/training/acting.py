"""The terms of a running stage: what they are given, what penalties came to, and the states that they change."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_graft.errors import CLGraftError, Diverged
from cl_graft.training.term import Term, holder, replaced


class Terms:
    """The terms of a running stage: their states on the device, and what their penalties came to lately."""

    def __init__(self, terms: Sequence[Term], device: torch.device | str):
        changed = {holder(terms, term) for term in terms if term.kind == "follow"}
        held = {n: _on(device, terms[n], n in changed) for n in {holder(terms, t) for t in terms}}
        pairs = [(term, held[holder(terms, term)]) for term in terms]
        self.followers = [(t, state) for t, state in pairs if t.kind == "follow"]
        self.followed = {f"{n}/{name}": x for n in sorted(changed) for name, x in held[n].items()}
        self.penalties = [(t, state) for t, state in pairs if t.kind in ("penalty", "loss")]
        self.projections = [(t, state) for t, state in pairs if t.kind == "project"]
        self.logits = any(t.logits for t, _ in self.penalties)
        self.instead = replaced(terms)
        self.sums: dict[str, Tensor] = {}
        self.count = 0

    def penalty(self, model: Any, batch: Mapping[str, Any], output: Any, step: int) -> Tensor:
        """The sum of all penalties and of a loss, of a micro-batch; a value without a gradient is only logged.

        Raises Diverged for one that is no finite number.
        """
        values: dict[str, Tensor] = {}
        for term, state in self.penalties:
            given = term.function(model, batch, output, state, **term.options)
            for name, value in _named(term, given).items():
                if name in values:
                    raise CLGraftError(
                        f"two terms are called {name!r}; name one of them otherwise."
                    )
                if not torch.isfinite(value):
                    raise Diverged(
                        f"the term {name} is {value.item()} in step {step + 1}, so the stage is not kept; "
                        "lower its weight or the learning rate, or mend it."
                    )
                values[name] = value
                self.sums[name] = self.sums.get(name, 0) + value.detach().float()
        self.count += 1
        return torch.stack([value.float() * value.requires_grad for value in values.values()]).sum()

    def project(self, model: Any, gradients: dict[str, Tensor], step: int) -> None:
        """Let each projection change the gradients. Raises Diverged if they are not finite then."""
        given = dict(gradients)
        for term, state in self.projections:
            term.function(model, gradients, state, step, **term.options)
            for name, gradient in given.items():
                if gradients.get(name) is not gradient:
                    raise CLGraftError(
                        f"the term {term.name} has put another tensor in the place of the gradient of {name}; "
                        "write into the one that is there, as by copy_."
                    )
                if not torch.isfinite(gradient).all():
                    raise Diverged(
                        f"the gradient of {name} is not finite after the term {term.name} in step {step + 1}, "
                        "so the stage is not kept; mend the term or lower the learning rate."
                    )

    @torch.no_grad()
    def follow(self, model: Any, step: int) -> None:
        """Let each term that follows the weights change its state, after the `step`th step."""
        for term, state in self.followers:
            term.function(model, state, step, **term.options)

    def save(self, file: Path) -> None:
        """Write the states that terms change, where there are any."""
        if self.followed:
            save_file({name: x.cpu().contiguous() for name, x in self.followed.items()}, file)

    @torch.no_grad()
    def restore(self, file: Path) -> None:
        """Go on from the states that `save` wrote."""
        if self.followed:
            for name, value in load_file(file).items():
                self.followed[name].copy_(value)

    def means(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """What each penalty came to on average since it was last asked, over all processes."""
        if not self.count:
            return {}
        mean = torch.stack(list(self.sums.values())) / self.count
        averages = dict(zip(self.sums, gather(mean[None]).mean(0).tolist(), strict=True))
        self.sums, self.count = {}, 0
        return averages


def _on(device: torch.device | str, term: Term, copied: bool) -> dict[str, Tensor]:
    """A term's state on the device, `copied` where it will be changed."""
    return {name: x.detach().to(device, copy=copied) for name, x in term.state.items()}


def _named(term: Term, given: Any) -> dict[str, Tensor]:
    """{name in the log: scalar} of what a penalty gave."""
    parts = (
        {f"{term.name}.{k}": x for k, x in given.items()}
        if isinstance(given, Mapping)
        else {term.name: given}
    )
    for name, value in parts.items():
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise CLGraftError(
                f"the term {name} gives {type(value).__name__}, not a tensor of one number; mend it."
            )
    return {name: value.squeeze() for name, value in parts.items()}
