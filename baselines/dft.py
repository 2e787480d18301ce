"""Dynamic fine-tuning: each token's loss times its own probability, held fixed (Wu et al. 2025, arXiv 2508.05629)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl_graft.strategy import Strategy
from cl_graft.training.term import Term


class dft(Strategy):
    """SFT with -sg(p) log p of every answer token in the place of -log p, where p is the probability that the model
    gives the token and sg lets no gradient through: unlikely tokens pull less. As TRL's loss_type="dft".

    It has no option of its own; the paper's learning rates are those of SFT. DPO, where a recipe has that half, is as
    it is. A step holds the logits, (micro-batch, length, vocabulary).
    """

    keeps = "latest"
    terms = ("loss",)
    budgeted = False

    def learn(self, task, context):
        return context.dense(self.fine_tune(task, context, [Term.loss(loss, logits=True)]))


def loss(model: Any, batch: dict[str, Any], output: Any, state: dict[str, Tensor]) -> Tensor:
    """The mean of -sg(p) log p over the answer tokens of a step."""
    targets = batch["labels"][:, 1:]
    asked = targets != -100
    logs = output.logits[:, :-1][asked].float().log_softmax(-1)
    said = logs.gather(-1, targets[asked][:, None])
    return -(said.detach().exp() * said).sum() / batch["tokens"]
