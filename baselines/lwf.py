"""Learning without forgetting: the last model's answers to the new prompts are kept (arXiv 1606.09282)."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from cl_graft.ranges import Positive, Rest, Strength
from cl_graft.skillpack.codecs import Encoded
from cl_graft.strategy import Context, Strategy
from cl_graft.task import Task
from cl_graft.training.term import Term


class lwf(Strategy):
    """Distillation from the second task on: the loss is raised by T^2 KL(old || new) of the next-token distributions at
    temperature T, over every answer token of the new task's batches; `old` is the model that the task starts from.

    No text and no model of earlier tasks is kept: what `sequential` keeps is all. DPO is held to the same old model,
    in chosen and rejected answers. A step costs one forward pass more, the weights of the old model, and logits of
    both models, (micro-batch, length, vocabulary), which training else never holds.
    """

    keeps = "latest"
    terms = ("penalty",)
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        alpha: Annotated[Rest, Strength(0.1, 0.3, 0.5, 0.7, 0.9)] = 0.5,
        temperature: Positive = 2.0,
    ) -> dict[str, Encoded]:
        """alpha: the loss is that of (1 - alpha) CE + alpha T^2 KL, divided by 1 - alpha; .5 is EasyCL's. The paper
        has no T^2: its lambda_o = 1 is alpha = 1 / (1 + T^2), 0.2 at T = 2. temperature: the paper's and EasyCL's."""
        terms = []
        if self.packs:
            old = {name: p.detach().clone() for name, p in self.model.named_parameters()}
            options = {"weight": alpha / (1 - alpha), "temperature": temperature}
            terms = [Term.penalty(penalty, old, logits=True, **options)]
        return context.dense(self.fine_tune(task, context, terms))


def penalty(
    model: Any,
    batch: dict[str, Tensor],
    output: Any,
    state: dict[str, Tensor],
    *,
    weight: float,
    temperature: float,
) -> Tensor:
    """weight T^2 KL(old || new), the mean over the answer tokens of a step. state: the old model's parameters."""
    training, asked = model.training, batch["labels"][:, 1:] != -100
    given = {name: batch[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
    model.eval()  # the old model's dropout is off
    with torch.no_grad():
        old = torch.func.functional_call(model, state, kwargs=given).logits[:, :-1][asked]
    model.train(training)
    before, now = (x.float() / temperature for x in (old, output.logits[:, :-1][asked]))
    apart = torch.nn.functional.kl_div(
        now.log_softmax(-1), before.log_softmax(-1), reduction="sum", log_target=True
    )
    return weight * temperature**2 * apart / batch["tokens"]
