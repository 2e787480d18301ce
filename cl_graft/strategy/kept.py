"""What a method keeps of a task: a pack of its own, and artefacts that its tasks share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from cl_graft.errors import AuthorMistake, CLGraftError, Diverged, first_line
from cl_graft.models.spread import named_weights
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.encoded import finite
from cl_graft.strategy.context import Context

Keeps = Literal["per_task", "sum", "latest", "merged"]  # which packs answer (strategy/base.py)
Tensors = Mapping[str, Encoded]
ROUTER = "router"  # the shared artefact that tells tasks apart


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
        for name, weight in named_weights(model):
            if not torch.isfinite(weight).all():
                raise Diverged(
                    f"{whose} diverged: its training left NaN or Inf in {name}; lower the learning rate."
                ) from error
        if isinstance(error, torch.linalg.LinAlgError):
            reason = first_line(error)
            raise Diverged(
                f"{whose} cannot decompose what training changed ({reason}); lower the learning rate."
            ) from error
        raise


def as_kept(returned: Any, author: str) -> Kept:
    """What `learn` returned. Raises AuthorMistake where it is neither encoded tensors by name nor a Kept.

    author: the method's line and name, for the error.
    """
    kept = returned if isinstance(returned, Kept) else Kept(returned)
    parts = [kept.own, *kept.shared.values()] if isinstance(kept.shared, Mapping) else [None]
    for tensors in parts:
        wrong: Any = tensors
        if isinstance(tensors, Mapping):
            wrong = next((x for x in tensors.values() if not isinstance(x, Encoded)), None)
            if wrong is None:
                continue
        inside = "under a name " if isinstance(tensors, Mapping) else ""
        raise AuthorMistake(
            f"{author} returns {inside}a {type(wrong).__name__}; return "
            "{parameter: encoded tensor}, as cl_graft.skillpack.codecs.dense(tensor) makes them, or a Kept of such."
        )
    return kept


def finite_only(kept: Kept, whose: str) -> Kept:
    """What was learned, all of it finite numbers. Raises Diverged."""
    for tensors in (kept.own, *kept.shared.values()):
        for name, encoded in tensors.items():
            if not finite(encoded):
                raise Diverged(
                    f"{whose} keeps NaN or Inf in {name}; mend its `learn`, or lower the learning rate."
                )
    return kept


def require_touched(own: Tensors, context: Context, whose: str) -> None:
    """Raises CLGraftError for a delta of a parameter that stays as it is while the task is learned."""
    if strange := own.keys() & context.frozen:
        name = min(strange)
        role = context.roles[name]
        raise CLGraftError(
            f"{whose} keeps a delta of {name}, whose role ({role}) it declares not to touch, or the task's recipe "
            "freezes; leave it out, or name the role in touches."
        )


def require_name(artefact: str, author: str) -> None:
    """Raises AuthorMistake for a shared artefact whose name no file could bear, or that is the harness's."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", artefact) or artefact == ROUTER:
        raise AuthorMistake(
            f"{author} calls a shared artefact {artefact!r}; name it in small letters, digits, - and _, and not "
            f"{ROUTER!r}, which is the harness's."
        )
