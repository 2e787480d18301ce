"""Choosing a factor on validation data: the one under which the tasks seen lose least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_graft.models.spread import copies, write
from cl_graft.skillpack.codecs import Encoded, decode, exact, original
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy.context import Context, validation
from cl_graft.strategy.kept import Kept, Tensors
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


def best_scale(strategy: Strategy, task: Task, vector: Tensors, grid: Sequence[float]) -> float:
    """The scale of a shared vector, made after `task`, under which the tasks seen lose least on their validation."""
    strategy.restore_base()
    pack = strategy._pack(task, vector)
    seen = strategy.scenario.tasks[: len(strategy.packs) + 1]

    def lost(x: float) -> float:
        merged = [compose(scaled, [pack], pack.shapes, scale=x)]
        return sum(validation_loss(strategy, merged, task) for task in seen)

    best = min(grid, key=lost)
    strategy.grafted.unload()
    return best


def kept_scaled(
    strategy: Strategy,
    task: Task,
    own: Tensors,
    vector: Tensors,
    grid: Sequence[float],
    scale: float | None,
) -> Kept:
    """A task's own delta, the vector that all tasks share, and its scale: the one given, or the best of the grid."""
    chosen = best_scale(strategy, task, vector, grid) if scale is None else scale
    told = exact(torch.tensor(chosen, dtype=torch.float64))
    return Kept(own, {"vector": vector, "chosen": {"scale": told}})


def composed_scaled(strategy: Strategy) -> Sequence[SkillPack]:
    """What answers of what `kept_scaled` keeps: the vector times its scale; one task alone is itself."""
    if len(strategy.packs) < 2:
        return strategy.packs
    vector, chosen = strategy.shared["vector"], strategy.shared["chosen"].tensors["scale"]
    return [compose(scaled, [vector], vector.shapes, scale=original(chosen).item())]


def scaled(name: str, vector: SkillPack, *, scale: float) -> Tensor:
    """A parameter's delta times a scale, to `compose` a shared vector with."""
    return vector.delta(name).mul_(scale)


@torch.no_grad()
def kept_loss(context: Context, tensors: Mapping[str, Encoded]) -> float:
    """Loss on the validation of the task just learned under what a method would keep: the start plus these tensors.

    The model holds the same weights afterwards as before.
    """
    model = context.model
    held = copies(model)
    write(model, partial(_with, context.start, tensors))
    training = model.training
    model.eval()
    losses = [model(**batch).loss.item() for batch in context.validation(SIZE)]
    model.train(training)
    write(model, held.__getitem__)
    return sum(losses) / len(losses)


def _with(start: Mapping[str, Tensor], tensors: Mapping[str, Encoded], name: str) -> Tensor:
    weight = start[name]
    return weight + decode(tensors[name]).to(weight) if name in tensors else weight
