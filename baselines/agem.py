"""A-GEM: gradients that would undo the memory's are projected (Chaudhry et al. 2019, arXiv 1812.00420)."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

from cl_graft.ranges import Count
from cl_graft.strategy import Context, Kept, Strategy
from cl_graft.strategy.kept import Tensors
from cl_graft.strategy.memory import MEMORY, Memory, gradients, some, tokens
from cl_graft.task import Task
from cl_graft.training.config import sft_job
from cl_graft.training.term import Term


class agem(Strategy):
    """Where a step's gradient g and that of a batch of remembered examples, r, have a negative inner product, the
    step takes g - (g.r / r.r) r (the paper's equation 11): to first order the memory's loss does not rise under SGD.
    AdamW, which the recipes use, scales what comes out of it.

    The memory is `replay`'s reservoir, where the paper keeps as many examples of each task and class. r is of SFT's
    loss on the answers, also while DPO trains: the memory holds no pairs. A step costs a forward and a backward pass
    over the batch more, in one piece, with its logits, and the memory of one more gradient.
    """

    keeps = "latest"
    terms = ("project",)
    budgeted = False

    def learn(self, task: Task, context: Context, *, size: Count = 500, batch: Count = 32) -> Kept:
        """size: examples of the memory, as of `replay`. batch: drawn from it anew for each step; the paper's code
        takes 128 to 1,280 images for batches of 10, texts of hundreds of tokens are more than that."""
        kept, terms = self.shared.get(MEMORY), []
        self.memory = Memory(size, self.seed, kept and kept.tensors)
        if old := self.memory["sft"].rows:
            state = tokens(context.tokenizer, old, task.training.max_length)
            terms = [Term.project(project, state, batch=batch, seed=self._stage_seed)]
        self.memory.see("sft", sft_job(task, self.seed)[0])
        return Kept(context.dense(self.fine_tune(task, context, terms)), self.foreseen())

    def foreseen(self) -> Mapping[str, Tensors]:
        return {MEMORY: self.memory.tensors()}


def project(
    model: Any,
    found: dict[str, Tensor],
    state: dict[str, Tensor],
    step: int,
    *,
    batch: int,
    seed: int,
) -> None:
    """Take from the gradients what points against the reference, in place. state: the memory's tokens."""
    everyone = range(len(state["input_ids"]))
    rows = Random(f"{seed}/{step}").sample(everyone, min(batch, len(everyone)))
    reference = gradients(model, some(state, rows), found)
    pairs = [
        (g, r.to(g.dtype))
        for g, r in zip(found.values(), reference.values(), strict=True)
        if r is not None
    ]
    inner = torch.stack([(g * r).sum() for g, r in pairs]).sum()
    if inner < 0:
        scale = inner / torch.stack([r.square().sum() for _, r in pairs]).sum()
        for g, r in pairs:
            g.sub_(scale * r)
