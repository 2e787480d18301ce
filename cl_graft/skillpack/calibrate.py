"""Second moments of what the linear layers read, from the model's own forward pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of everything that multiplies its input by a matrix: nn.Linear and GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def stored_transposed(model: nn.Module) -> set[str]:
    """Parameter names of matrices stored (in, out), as Conv1D does."""
    return {f"{n}.weight" for n, m in linear_layers(model).items() if not isinstance(m, nn.Linear)}


@torch.no_grad()
def input_hessians(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """X^T X / n for each linear layer, float32 (in, in) by parameter name; padding is left out.

    One forward of the model's own code a batch. Modules that read the same tensor share one matrix.
    """
    sums: dict[str, Tensor] = {}
    shares: dict[str, str] = {}
    seen: dict[int, tuple[Tensor, str]] = {}
    counted, keep = 0, torch.empty(0)

    def hook_for(name: str):
        def hook(module, inputs, output):
            x = inputs[0]
            if id(x) in seen:
                shares[name] = seen[id(x)][1]
                return
            seen[id(x)] = (x, name)  # holding x keeps its id from being used again in this pass
            shares[name] = name
            rows = x.reshape(-1, x.shape[-1])
            rows = rows[keep].float() if len(rows) == len(keep) else rows.float()
            sums[name] = sums.get(name, 0) + rows.T @ rows

        return hook

    hooks = [m.register_forward_hook(hook_for(n)) for n, m in linear_layers(model).items()]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            keep = batch["attention_mask"].reshape(-1).bool()
            counted += int(keep.sum())
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            seen.clear()
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return {f"{name}.weight": sums[shares[name]] / max(1, counted) for name in shares}
