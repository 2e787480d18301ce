"""Choosing a factor on validation data: the one under which the tasks seen lose least."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from cl_graft.skillpack.format.file import SkillPack
from cl_graft.strategy.context import validation
from cl_graft.task import Task

if TYPE_CHECKING:
    from cl_graft.strategy.base import Strategy

SIZE = 32  # examples of a validation batch


@torch.no_grad()
def validation_loss(strategy: Strategy, packs: Sequence[SkillPack], task: Task) -> float:
    """The loss of the answers' tokens on a task's validation, the mean over its batches, under the base plus the packs.

    A loss, and no score of generated answers: it takes one pass, and moves where exact answers stand still. The model
    of the strategy holds the base's weights but for packs that are active.
    """
    model = strategy.model
    strategy.grafted.activate(packs)
    training = model.training
    model.eval()
    batches = validation(model, strategy.tokenizer, task, SIZE)
    losses = [model(**batch).loss.item() for batch in batches]
    model.train(training)
    return sum(losses) / len(losses)
