"""The losses of TRL's trainers, by the head that suits their size: plain for few logits, fused in tiles for many.

TRL 1.16 always runs its fused head, in tiles of 32,768 logits a position however small the vocabulary is, each
computed twice. Where all logits are few, that is slower than PyTorch's own operations and takes more memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FEW = 1 << 24  # logits, 64 MiB in float32: for up to so many the plain head is run
# the same on a CPU, where TRL's tiles take four products of every place, labelled or not
MANY = 1 << 27


class Told(NamedTuple):
    """Sums over the answer tokens of a micro-batch, each a scalar tensor; `nll` carries the gradient."""

    nll: Tensor
    entropy: Tensor
    right: Tensor
    answers: Tensor


def plain(logits: Tensor, labels: Tensor) -> Told:
    """Sums over answers, from logits (batch, length, vocabulary) and labels (batch, length) not shifted yet."""
    targets = labels[:, 1:].flatten()
    logs = logits[:, :-1].flatten(0, 1).float().log_softmax(-1)
    nll = functional.nll_loss(logs, targets, ignore_index=-100, reduction="sum")
    with torch.no_grad():
        mask = targets != -100
        entropy = _entropy(logs).masked_fill(~mask, 0).sum()
        right = ((logs.argmax(-1) == targets) & mask).sum()
    return Told(nll, entropy, right, mask.sum())


def fused(output: Any) -> Told:
    """Sums over answers, from what a model with TRL's fused head gives."""
    given = (output.entropy.detach().sum(), output.is_top1.sum(), output.label_mask.sum())
    return Told(-output.log_probs.sum(), *given)


def unfused(model: Any, labels: Tensor, fused_lm_head: bool, **inputs: Any) -> Any:
    """What a model with TRL's fused head gives, from logits, which stay in the output."""
    from trl.trainer.utils import FusedCausalLMOutput

    full = model(**inputs)
    targets = labels[:, 1:]
    mask = targets != -100
    told = scored(full.logits[:, :-1], targets.clamp(min=0))
    output = FusedCausalLMOutput(
        **{name: values.masked_fill(~mask, 0) for name, values in told.items()},
        label_mask=mask,
        aux_loss=getattr(full, "aux_loss", None),
    )
    output.logits = full.logits
    return output


def scored(logits: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What TRL's fused head tells of each place, from its logits (..., vocabulary) and its target (...).

    All but the log-probability is without gradient, and made of few logits at a time.
    """
    logs = logits.float().log_softmax(-1)
    with torch.no_grad():
        rows = max(1, FEW // 4 // logs.shape[-1])
        parts = zip(logits.flatten(0, -2).split(rows), logs.flatten(0, -2).split(rows), strict=True)
        seen = [(_entropy(y), y.argmax(-1), x.float().mean(-1)) for x, y in parts]
        entropy, top, mean = (torch.cat(x).view_as(targets) for x in zip(*seen, strict=True))
    return {
        "log_probs": logs.gather(-1, targets[..., None])[..., 0],
        "entropy": entropy,
        "mean_logits": mean,
        "is_top1": top == targets,
    }


def _entropy(logs: Tensor) -> Tensor:
    return -(logs.exp().mul_(logs)).sum(-1)
