"""Mixtures of experts as transformers 5 holds them: the matrices of all experts of a layer in one parameter.

Told from the modules themselves, not from a list of architectures. A module that transformers knows how to run expert
by expert says so by its attributes (`has_gate`, `has_bias`, `is_transposed`), and names its parameters in one way.
"""

from __future__ import annotations

from typing import Literal

from torch import nn
from torch.nn.modules.conv import _ConvNd

Stacked = Literal["matrices", "vectors"]


def stacked(model: nn.Module) -> dict[str, Stacked]:
    """Parameter name -> what it holds one of for each expert: matrices, (experts, out, in) or (experts, in, out), or
    vectors, (experts, out). Parameters that hold neither are not there; those of a router are none."""
    found: dict[str, Stacked] = {}
    for name, module in model.named_modules():
        own = list(module.named_parameters(prefix=name, recurse=False))
        counts = {p.shape[0] for _, p in own if p.ndim == 3}
        if isinstance(module, _ConvNd) or len(counts) != 1:
            continue
        for parameter, p in own:
            if p.shape[:1] == (next(iter(counts)),) and p.ndim in (2, 3):
                found[parameter] = "matrices" if p.ndim == 3 else "vectors"
    return found


def routed(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of all experts of a layer, where it computes as transformers' own experts do.

    Its forward takes the hidden states of all tokens (tokens, width), the experts of each (tokens, k) and their weights
    (tokens, k); `first_matrix` and `down_proj` are its stacks.
    """
    return {name: m for name, m in model.named_modules() if _is_routed(m)}


def first_matrix(experts: nn.Module) -> str:
    """The name of the stack that reads what is routed to the experts; `down_proj` reads what becomes of it."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def transposed_stacks(model: nn.Module) -> set[str]:
    """Names of the stacks that are stored (experts, in, out)."""
    return {
        name
        for name, what in stacked(model).items()
        if what == "matrices"
        and getattr(model.get_submodule(name.rpartition(".")[0]), "is_transposed", False)
    }


def _is_routed(module: nn.Module) -> bool:
    says = all(hasattr(module, word) for word in ("has_gate", "has_bias", "is_transposed"))
    if not says:
        return False
    stacks = (getattr(module, name, None) for name in (first_matrix(module), "down_proj"))
    return all(isinstance(p, nn.Parameter) and p.ndim == 3 for p in stacks)
