"""I-LoRA: a slow LoRA averages the fast one, which is held to it on old rows (Ren et al. 2024, arXiv 2402.18865).

After every step slow <- alpha slow + (1 - alpha) fast, A and B each; the loss is CE over new and replayed rows, as many
of each, and weight times the mean squared difference of both models' hidden states on the replayed ones, over all
layers and all tokens that are no padding. Slow weights answer; at the published alpha they are hardly a step behind.

Where others differ: the authors' code (which47/LLMCL) counts an entry of the hidden states only where the fast one is
the smaller, and begins each task with the slow weights as the fast ones; EasyCL's alpha weighs the *fast* weights, and
its average is never taken (it looks for parameters without `default` in their names, and PEFT's all have it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_graft.ranges import Count, NotNegative, Positive, Rest, Share
from cl_graft.strategy import Context, Kept
from cl_graft.strategy.replaying import Averaged
from cl_graft.task import Task
from cl_graft.training.config import sft_job
from cl_graft.training.term import Term


class i_lora(Averaged):
    """Replays rows of a reservoir as `replay` does; SFT holds the fast LoRA to the slow one on them, DPO replays pairs
    and holds nothing. A step costs two passes over its old rows more, one of them with gradients."""

    def learn(
        self,
        task: Task,
        context: Context,
        *,
        alpha: Share = 0.25,
        weight: NotNegative = 1.0,
        size: Count = 500,
        share: Rest = 0.5,
        rank: Count = 8,
        alpha_over_rank: Positive = 4.0,
        dropout: Rest = 0.1,
        learning_rate_scale: Positive = 3.0,
    ) -> Kept:
        """alpha, weight, size: the authors' code's and EasyCL's. share: of old rows, as many as new ones; its code adds
        a batch of them to every batch. rank, alpha_over_rank, dropout: its code's 8, 32 / 8 and 0.1, on attention alone
        there, here as for `lora`, as learning_rate_scale is."""
        self.remember(size, share)
        rows, job = sft_job(task, self._stage_seed)
        new, every = len(rows), len(self.memory.mixed(rows, job, share))

        def held(slow: Mapping[str, Tensor]) -> Sequence[Term]:
            options = {"weight": weight, "new": new, "old": every - new}
            return [Term.penalty(penalty, slow, **options)] if every > new else []

        return self.taught(
            task,
            terms=held,
            decay=alpha,
            rank=rank,
            alpha_over_rank=alpha_over_rank,
            dropout=dropout,
            learning_rate_scale=learning_rate_scale,
        )


def penalty(
    model: Any,
    batch: dict[str, Tensor],
    output: Any,
    state: dict[str, Tensor],
    *,
    weight: float,
    new: int,
    old: int,
) -> Tensor:
    """weight times the mean over replayed rows of the squared difference of hidden states, fast and slow.

    state: the slow A and B. new, old: rows of the stage; the last ones are old. A row that is expected `old` times in
    new + old rows weighs the same however many there are in a micro-batch.
    """
    replayed = batch["rows"] >= new
    if "completion_mask" in batch or not replayed.any():  # DPO's pairs are no texts
        return torch.zeros((), device=batch["input_ids"].device)
    given = {name: batch[name][replayed] for name in ("input_ids", "attention_mask")}
    asked = {**given, "use_cache": False, "output_hidden_states": True}
    fast, training = model(**asked).hidden_states, model.training
    model.eval()  # the slow model's dropout is off
    with torch.no_grad():
        slow = torch.func.functional_call(model, state, kwargs=asked).hidden_states
    model.train(training)
    mask = given["attention_mask"][..., None]
    apart = [
        ((f.float() - s.float()).square() * mask).mean(-1).sum(1) / mask.sum((1, 2))
        for f, s in zip(fast, slow, strict=True)
    ]
    return weight * torch.stack(apart).mean(0).sum() * (new + old) / (old * len(replayed))
