"""Second moments of what each layer reads and of the loss's gradient at what it writes, from the model's own code."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass
class Moments:
    """By parameter name, float32, per token of the calibration text.

    inputs: (in, in), X^T X / n of a linear layer's inputs; for an embedding (vocabulary,), how often each
    row is read. outputs: (out,), mean square of the loss's gradient with respect to each output, so that
    `outputs[i] * (squared error of output i)` is the squared change of the loss to first order.
    """

    inputs: dict[str, Tensor] = field(default_factory=dict)
    outputs: dict[str, Tensor] = field(default_factory=dict)


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> module of everything that multiplies its input by a matrix: nn.Linear and GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}


def stored_transposed(model: nn.Module) -> set[str]:
    """Parameter names of matrices stored (in, out), as Conv1D does."""
    return {f"{n}.weight" for n, m in linear_layers(model).items() if not isinstance(m, nn.Linear)}


def _reads_tokens(module: nn.Module, model: nn.Module) -> bool:
    """Whether an embedding's input is its row numbers; subclasses (OPT's positions) may read something else."""
    return type(module) is nn.Embedding or module is model.get_input_embeddings()  # type: ignore[operator]


def moments(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], gradients: bool = True
) -> Moments:
    """One forward (and backward) of the model's own code a batch, each with input_ids, attention_mask, labels.

    Padding is left out. Modules that read the same tensor share one matrix. The model's parameters and
    their gradients are left as they were found.
    """
    layers = linear_layers(model)
    layers |= {n: m for n, m in model.named_modules() if _reads_tokens(m, model)}
    sums, shares, grads = dict[str, Tensor](), dict[str, str](), dict[str, Tensor]()
    seen: dict[int, tuple[Tensor, str]] = {}
    keep, counted = torch.empty(0), 0

    def reads(name: str, module: nn.Module, x: Tensor) -> None:
        if id(x) in seen:
            shares[name] = seen[id(x)][1]
            return
        seen[id(x)] = (x, name)  # holding x keeps its id from being used again in this pass
        shares[name] = name
        if isinstance(module, nn.Embedding):
            if len(x) == 1:  # positions, the same for every sequence of the batch
                x = x.expand(len(batch["input_ids"]), -1)
            rows = x.reshape(-1)
        else:
            rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows[keep] if len(rows) == len(keep) else rows
        if isinstance(module, nn.Embedding):
            found = torch.bincount(rows, minlength=module.num_embeddings).float()
        else:
            found = rows.float().T @ rows.float()
        sums[name] = sums[name] + found if name in sums else found

    def writes(name: str, grad: Tensor) -> None:
        rows = grad.detach().reshape(-1, grad.shape[-1])
        found = rows.float().square().sum(0)
        grads[name] = grads[name] + found if name in grads else found

    def hook_for(name: str):
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            reads(name, module, inputs[0])
            if gradients:
                output.register_hook(lambda grad: writes(name, grad))

        return hook

    hooks = [module.register_forward_hook(hook_for(name)) for name, module in layers.items()]
    was_training, gradients_found = model.training, [p.grad for p in model.parameters()]
    model.zero_grad(set_to_none=True)
    model.eval()
    try:
        for batch in batches:
            keep = batch["attention_mask"].reshape(-1).bool()
            counted += int(keep.sum())
            with torch.set_grad_enabled(gradients):
                loss = model(**batch).loss
                if gradients:  # of the sum, so that no token's depends on how many the batch has
                    (loss * (batch["labels"][:, 1:] != -100).sum()).backward()
            seen.clear()
    finally:
        for parameter, found in zip(model.parameters(), gradients_found, strict=True):
            parameter.grad = found
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    n = max(1, counted)
    means = {name: total / n for name, total in sums.items()}
    return Moments(
        {f"{name}.weight": means[shared] for name, shared in shares.items()},
        {f"{name}.weight": total / n for name, total in grads.items()},
    )
