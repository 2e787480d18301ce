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
        entropy = -(logs.exp() * logs).sum(-1).masked_fill(~mask, 0).sum()
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
    logits = full.logits[:, :-1].float()
    logs = logits.log_softmax(-1)
    picked = logs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    with torch.no_grad():
        entropy = -(logs.exp() * logs).sum(-1)
        top, mean = logits.argmax(-1) == targets, logits.mean(-1)
    output = FusedCausalLMOutput(
        log_probs=picked.masked_fill(~mask, 0),
        entropy=entropy.masked_fill(~mask, 0),
        mean_logits=mean.masked_fill(~mask, 0),
        is_top1=top & mask,
        label_mask=mask,
        aux_loss=getattr(full, "aux_loss", None),
    )
    output.logits = full.logits
    return output
