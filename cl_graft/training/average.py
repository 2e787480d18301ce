"""A moving average of the weights that are trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def average(model: Any, state: dict[str, Tensor], step: int, *, decay: float) -> None:
    """slow <- decay slow + (1 - decay) fast, of every parameter that `state` has by its name; a term's `follow`."""
    fast = dict(model.named_parameters())
    for name, slow in state.items():
        slow.lerp_(fast[name].to(slow.dtype), 1 - decay)
