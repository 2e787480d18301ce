"""TALL-masks: the entries that each task uses of the sum of all tasks' deltas (Wang et al. 2024, arXiv 2405.07813).

t = sum of the tasks' deltas D; m_t = |D_t| > lambda |t - D_t|. As in nik-dim/tall_masks (src/utils/tallmask_utils.py),
lambda is chosen for each task among 0.2, 0.3, ..., 0.6 on its validation data: here by the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cl_graft.skillpack.codecs import Encoded, decode, dense, mask
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.composed import compose
from cl_graft.strategy.choose import validation_loss
from cl_graft.strategy.kept import Tensors

if TYPE_CHECKING:
    from cl_graft.strategy.base import Strategy

LAMBDAS = (0.2, 0.3, 0.4, 0.5, 0.6)


def masked_sum(
    strategy: Strategy, deltas: Mapping[str, Tensors], mask_lambda: float | None
) -> tuple[dict[str, Encoded], dict[str, Encoded]]:
    """t, {parameter: bf16}, and every task's mask, {task/parameter: a bit an entry}, both encoded.

    deltas: {task: {parameter: encoded}}, of which one tensor is decoded at a time. mask_lambda: of all tasks; None is
    for each the one under which it loses least where its part of t answers. The model holds the base's weights then.
    """
    # of one task alone the mask is the same under all
    tried = LAMBDAS if mask_lambda is None and len(deltas) > 1 else (mask_lambda or LAMBDAS[0],)
    vector, masks = _shared(deltas, tried)
    chosen = dict.fromkeys(deltas, tried[0])
    if len(tried) > 1:
        strategy.restore_base()
        chosen = {name: _best(strategy, name, vector, masks) for name in deltas}
        strategy.grafted.unload()
    keys = [(of, f"{of}/{name}") for of in deltas for name in vector]
    return vector, {key: masks[chosen[of]][key] for of, key in keys}


def _best(strategy: Strategy, name: str, vector: Tensors, masks: Mapping[float, Tensors]) -> float:
    """The lambda under which a task loses least on its validation."""
    task = next(t for t in strategy.scenario.tasks if t.name == name)

    def lost(x: float) -> float:
        made_of = strategy._pack(task, vector), strategy._pack(task, masks[x])
        pack = compose(masked, made_of, made_of[0].shapes, task=name)
        return validation_loss(strategy, [pack], task)

    return min(masks, key=lost)


def _shared(
    deltas: Mapping[str, Tensors], lambdas: Sequence[float]
) -> tuple[dict[str, Encoded], dict[float, dict[str, Encoded]]]:
    """t, {parameter: encoded}, and m_t, {lambda: {task/parameter: encoded}}."""
    vector: dict[str, Encoded] = {}
    masks: dict[float, dict[str, Encoded]] = {x: {} for x in lambdas}
    for name in next(iter(deltas.values())):
        total = sum((decode(tensors[name]) for tensors in deltas.values()), torch.zeros(()))
        for task, tensors in deltas.items():
            for x, bits in _parts(decode(tensors[name]), total, lambdas):
                masks[x][f"{task}/{name}"] = bits
        vector[name] = dense(total)
    return vector, masks


def _parts(
    change: Tensor, total: Tensor, lambdas: Sequence[float]
) -> Iterator[tuple[float, Encoded]]:
    """(lambda, m_t of a parameter, encoded); change is written to."""
    rest = (total - change).abs_()
    change.abs_()
    return ((x, mask(change > rest * x)) for x in lambdas)


def masked(name: str, vector: SkillPack, masks: SkillPack, *, task: str) -> Tensor:
    """m_t * t of a parameter."""
    return masks.delta(f"{task}/{name}").mul_(vector.delta(name))
