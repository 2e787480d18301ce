"""How much a model's answers depend on each of its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_graft.strategy.memory import some

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def fisher(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The diagonal empirical Fisher information: the mean over a batch's rows of each one's squared gradient.

    The gradient is that of the mean loss of a row's labels; dropout is off. batch: input_ids, attention_mask and
    labels, int64 (rows, length). Returns {parameter name: float32 tensor}; one row is computed at a time.
    """
    weights, training = dict(model.named_parameters()), model.training
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in weights.items()}
    count = len(batch["input_ids"])
    model.eval()
    for i in range(count):
        row = {name: x.to(model.device) for name, x in some(batch, [i]).items()}
        gradients = torch.autograd.grad(model(**row).loss, list(weights.values()))
        for total, gradient in zip(sums.values(), gradients, strict=True):
            total += gradient.float().square() / count
    model.train(training)
    return sums
