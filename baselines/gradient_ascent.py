"""Gradient ascent: unlearn a task by raising the loss of its answers (Jang et al. 2023, arXiv 2210.01504)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cl_graft.ranges import Positive
from cl_graft.skillpack.codecs import Encoded
from cl_graft.strategy import Context, Strategy
from cl_graft.task import Task
from cl_graft.training.adapters import faster
from cl_graft.training.term import Term


class gradient_ascent(Strategy):
    """Tasks are learned as by `sequential`; one that must go is trained on by its recipe with the loss's sign turned.

    Nothing bounds the loss that is climbed: the paper stops once the texts are no likelier than unseen ones, here the
    recipe's steps are the stop. What else was learned is not looked at.
    """

    keeps = "latest"
    terms = ("loss",)
    budgeted = False

    def learn(
        self, task: Task, context: Context, *, unlearning_rate_scale: Positive = 1.0
    ) -> dict[str, Encoded]:
        """unlearning_rate_scale: the learning rate of unlearning over that of the task's recipe."""
        return context.dense(self.fine_tune(task, context))

    def unlearn(
        self, task: Task, context: Context, *, unlearning_rate_scale: float
    ) -> dict[str, Encoded]:
        turned = [Term.loss(loss, logits=True)]
        return context.dense(self.fine_tune(faster(task, unlearning_rate_scale), context, turned))

    # by the recipe alone until something is unlearned, so that its stages are those of `sequential`
    learn.pure = True


def loss(model: Any, batch: dict[str, Tensor], output: Any, state: dict[str, Tensor]) -> Tensor:
    """Minus SFT's loss: the mean log-likelihood of the answer tokens of a step."""
    labels = batch["labels"][:, 1:]
    asked = labels != -100
    right = output.logits[:, :-1][asked].float().log_softmax(-1).gather(-1, labels[asked][:, None])
    return right.sum() / batch["tokens"]
