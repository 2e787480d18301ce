"""What a method keeps of a task: a pack of its own, and artefacts that its tasks share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from cl_graft.errors import Diverged
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.encoded import finite

Tensors = Mapping[str, Encoded]


@dataclass(frozen=True)
class Kept:
    """What `learn` returns where a task's own tensors are not all.

    own: the delta of the task, {parameter name: encoded}; what answers for it, unless `compose` says otherwise.
    shared: {name of an artefact: its tensors, under names of the method's choice}: Fisher information, a buffer of
    examples, a vector of all tasks. Each takes the place of the last one of its name; the others stay.
    """

    own: Tensors
    shared: Mapping[str, Tensors] = field(default_factory=dict)


@contextmanager
def watched(model: nn.Module, whose: str) -> Iterator[None]:
    """Raise Diverged where a codec or a decomposition of a method fails because the model's weights are no numbers.

    A training loop of the method's own is watched by nobody else. whose: the method and the task, for the error.
    """
    try:
        yield
    except (ValueError, ArithmeticError, torch.linalg.LinAlgError) as error:
        for name, parameter in model.named_parameters():
            if not torch.isfinite(parameter).all():
                raise Diverged(
                    f"{whose} diverged: its training left NaN or Inf in {name}; lower the learning rate."
                ) from error
        if isinstance(error, torch.linalg.LinAlgError):
            reason = str(error).strip().split("\n", 1)[0].rstrip(".")
            raise Diverged(
                f"{whose} cannot decompose what training changed ({reason}); lower the learning rate."
            ) from error
        raise


def finite_only(learned: Tensors | Kept, whose: str) -> Kept:
    """What was learned, all of it finite numbers. Raises Diverged."""
    kept = learned if isinstance(learned, Kept) else Kept(learned)
    for tensors in (kept.own, *kept.shared.values()):
        for name, encoded in tensors.items():
            if not finite(encoded):
                raise Diverged(
                    f"{whose} keeps NaN or Inf in {name}; mend its `learn`, or lower the learning rate."
                )
    return kept
