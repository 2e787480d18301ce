"""Model Grafting: a sparse mask over the delta, optimised to keep the task (Panigrahi et al. 2023, arXiv 2302.06600).

The mask starts from the largest entries and is optimised by gradient descent on the task's loss; the
number of kept weights stays what the budget holds. Embeddings and head stay as they were.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cl_graft.strategy import compressor

BIAS = 10.0  # g = g0 (1 - sigmoid(S - b)) + (1 - g0) sigmoid(S - b) starts close to g0


@compressor(keeps="sum")
def model_grafting(
    delta,
    context,
    *,
    epochs: int = 10,
    batches: int = 8,
    batch_size: int = 32,
    learning_rate: float = 4.0,
):
    """learning_rate: of the largest mask gradient, which is normalised to 1 each epoch (the paper's 1e7 fits its
    own gradients' size). One averaged step per epoch, as published; the mask that does best on batches of its
    own is kept, the starting one included.
    """
    fixed = {n for n, role in context.roles.items() if role in ("embedding", "head")}
    delta = {n: d for n, d in delta.items() if n not in fixed}
    start_mask = context.masks({n: d.abs() for n, d in delta.items()})
    budget = sum(int(mask.sum()) for mask in start_mask.values())
    validation = [
        next(source) for source in [context.batches(batch_size, seed=2)] for _ in range(4)
    ]
    training = context.batches(batch_size, seed=3)
    generator = torch.Generator().manual_seed(context.seed)
    logits = {
        n: torch.rand(d.shape, generator=generator).to(d.device) - BIAS for n, d in delta.items()
    }
    best_mask = start_mask
    best_loss = _loss(context, delta, start_mask, validation)
    for epoch in range(epochs):
        soft = {n: _soft(start_mask[n], logits[n]) for n in delta}
        gradient = _gradient(context, delta, soft, [next(training) for _ in range(batches)])
        for n in delta:
            gate = logits[n].sigmoid()
            gradient[n] *= delta[n] * (1 - 2 * start_mask[n].float()) * gate * (1 - gate)
        largest = max(g.abs().max() for g in gradient.values()).clamp_min(1e-30)
        for n in delta:
            logits[n] -= learning_rate * gradient[n] / largest
        mask = context.masks({n: _soft(start_mask[n], logits[n]) for n in delta}, at_most=budget)
        loss = _loss(context, delta, mask, validation)
        if loss < best_loss:
            best_loss, best_mask = loss, mask
        context.progress((epoch + 1) / epochs)
    return context.keep(delta, best_mask)


def _soft(start: Tensor, logits: Tensor) -> Tensor:
    gate = logits.sigmoid()
    return torch.where(start, 1 - gate, gate)


def _set(context, delta, mask) -> None:
    parameters = dict(context.model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            start = context.start[name]
            parameter.copy_(start + mask[name] * delta[name] if name in delta else start)


def _gradient(context, delta, soft, batches) -> dict[str, Tensor]:
    """Mean gradient of the loss with respect to the weights, at start + soft mask * delta."""
    _set(context, delta, soft)
    context.model.zero_grad(set_to_none=True)
    for batch in batches:
        (context.model(**batch).loss / len(batches)).backward()
    gradients = {n: p.grad.float() for n, p in context.model.named_parameters() if n in delta}
    context.model.zero_grad(set_to_none=True)
    return gradients


@torch.no_grad()
def _loss(context, delta, mask, batches) -> float:
    _set(context, delta, mask)
    return sum(context.model(**batch).loss.item() for batch in batches) / len(batches)
