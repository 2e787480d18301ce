"""Experts run one after the other, so that what each reads and writes can be seen apart.

transformers runs all experts of a layer by one of several functions (`config._experts_implementation`), none of which
shows the inputs of the second matrix. Here the layer's own parts, its activation and its parameters, are put together
as those functions do, for every architecture alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cl_graft.models.experts import first_matrix, routed
from cl_graft.models.spread import in_place
from cl_graft.skillpack.compress.sums import Expert, Sums


@contextmanager
def experts_apart(
    model: nn.Module, sums: Sums, inputs: bool = True, gradients: bool = True
) -> Iterator[None]:
    """Let the model's experts run so within, and add what they read, and the gradients at what they write, to sums."""
    modules = routed(model)
    before = {name: module.__dict__.get("forward") for name, module in modules.items()}
    for name, module in modules.items():
        module.forward = partial(_forward, module, name, sums, inputs, gradients)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for name, module in modules.items():
            del module.forward
            if (own := before[name]) is not None:
                module.forward = own  # type: ignore[method-assign]


def _forward(
    module: Any,
    name: str,
    sums: Sums,
    inputs: bool,
    gradients: bool,
    hidden: Tensor,
    index: Tensor,
    weights: Tensor,
) -> Tensor:
    """What a layer's experts make of `hidden` (tokens, width). index, weights: (tokens, k), of the experts of each."""
    experts = len(module.down_proj)
    if inputs:
        _note(module, name, sums, index)

    def product(x: Tensor, stack: str, number: int, token: Tensor) -> Tensor:
        weight, bias = getattr(module, stack)[number], None
        if module.has_bias:
            bias = getattr(module, f"{stack}_bias")[number]
        of_bias = f"{name}.{stack}_bias" if module.has_bias else None
        expert = Expert(f"{name}.{stack}", of_bias, number, experts, token)
        if inputs:
            sums.read_by(expert, x)
        y = linear(x, weight.T if module.is_transposed else weight, bias)
        if gradients and y.requires_grad:
            y.register_hook(partial(sums.wrote_by, expert))
        return y

    out = torch.zeros_like(hidden)
    with in_place(module):
        for number in index.unique().tolist():
            if number >= experts:  # no expert
                continue
            token, place = torch.where(index == number)
            x = product(hidden[token], first_matrix(module), number, token)
            x = module._apply_gate(x) if module.has_gate else module.act_fn(x)
            x = product(x, "down_proj", number, token)
            if getattr(module, "has_post_expert_norm", False):
                x = module.post_expert_norm(x)
            out.index_add_(0, token, (x * weights[token, place, None]).to(out.dtype))
    return out


def _note(module: Any, name: str, sums: Sums, index: Tensor) -> None:
    """Say what reads what, also of experts that no token reaches, and count the tokens of each."""
    sums.routed(name, index, len(module.down_proj))
    for stack in (first_matrix(module), "down_proj"):
        sums.reads[f"{name}.{stack}"] = f"{name}.{stack}"
        if module.has_bias:
            sums.reads[f"{name}.{stack}_bias"] = name
