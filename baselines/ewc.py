"""EWC: weights that earlier tasks depend on are held (arXiv 1612.00796; `online`: Schwarz et al., 1805.06370)."""

from __future__ import annotations

from random import Random
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from cl_graft.ranges import Count, NotNegative, Strength
from cl_graft.skillpack.codecs.exact import exact, original, unknown
from cl_graft.strategy import Context, Kept, Strategy
from cl_graft.strategy.fisher import fisher
from cl_graft.strategy.kept import Tensors
from cl_graft.strategy.memory import tokens
from cl_graft.task import Task
from cl_graft.training.config import sft_job
from cl_graft.training.term import Term


class ewc(Strategy):
    """Adds weight/2 * sum F (theta - theta*)^2 to the loss of every later task, SFT and DPO.

    F is the diagonal empirical Fisher information after a task: the mean over `samples` of its training examples,
    one at a time, of the squared gradient of what SFT minimises, the mean loss of the answer's tokens. Labels are the
    data's, not sampled from the model. Each F is kept in float32 and each theta* in the model's dtype, and counted.
    """

    keeps = "latest"
    terms = ("penalty",)
    budgeted = False

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        weight: Annotated[NotNegative, Strength(1e2, 1e3, 1e4, 1e5, 1e6)] = 1e4,
        samples: Count = 100,
        variant: Literal["online", "separate"] = "online",
        gamma: NotNegative = 1.0,
    ) -> Kept:
        """weight, samples: EasyCL's, which leaves the half out and squares gradients of whole batches.

        variant: `online` keeps one running F = gamma F + F_new, and theta* is where training starts; `separate` keeps
        F and theta* of every task and adds up their penalties. gamma: Mammoth's for seq-mnist, forgetting nothing.
        """
        seen, weights = len(self.packs), dict(self.model.named_parameters())
        kept = {k: {n: original(e) for n, e in p.tensors.items()} for k, p in self.shared.items()}
        state = {f"{k}/{n}": x for k, part in kept.items() for n, x in part.items()}
        if variant == "online" and seen:
            state |= {f"anchor-0/{n}": p.detach().clone() for n, p in weights.items()}
        terms = [Term.penalty(penalty, state, weight=weight)] if seen else []
        tuned = context.dense(self.fine_tune(task, context, terms))
        rows = sft_job(task, self.seed)[0]
        rows = Random(f"fisher/{self.seed}/{seen}").sample(rows, min(samples, len(rows)))
        new = fisher(self.model, tokens(context.tokenizer, rows, task.training.max_length))
        if variant == "online" and seen:
            new = {n: f + gamma * kept["fisher-0"][n].to(f.device) for n, f in new.items()}
        here = {n: exact(p) for n, p in weights.items()}
        return Kept(tuned, self._shared({n: exact(f) for n, f in new.items()}, here))

    def _shared(self, fisher: Tensors, anchor: Tensors) -> dict[str, Tensors]:
        if self.options["variant"] == "online":
            return {"fisher-0": fisher}
        return {f"fisher-{len(self.packs)}": fisher, f"anchor-{len(self.packs)}": anchor}

    def foreseen(self) -> dict[str, Tensors]:
        weights = dict(self.model.named_parameters())
        values = {n: unknown(p.shape, torch.float32) for n, p in weights.items()}
        return self._shared(values, {n: unknown(p.shape, p.dtype) for n, p in weights.items()})


def penalty(model: Any, batch: Any, output: Any, state: dict[str, Tensor], *, weight: float):
    """weight/2 * sum F (theta - theta*)^2 over all that is held. state: `fisher-i/{name}` and `anchor-i/{name}`."""
    sums = []
    for key in (key for key in state if key.startswith("fisher")):
        apart = model.get_parameter(key.split("/")[1]) - state[key.replace("fisher", "anchor", 1)]
        sums.append((state[key] * apart.float().square()).sum())
    return weight / 2 * torch.stack(sums).sum()
