"""Consensus task arithmetic by hand: what two tasks use is left, and one model answers for all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_graft.skillpack.codecs import original
from cl_graft.strategy.choose import validation_loss
from tests.baselines.drawn import NAME, entries, learn
from tests.baselines.methods import learn as train
from tests.baselines.methods import module

# TALL-masks at 0.4, as tests/baselines/test_tall_mask.py has them, of the sum 4 6 4 0:
# |D| against 0.4 |t - D|, which is 0 1.6 1.2 0, then 1.4 1.6 2 0, then 1.8 1.6 0 0: masks 1 1 0 0, 0 1 0 0, 0 1 1 0
DELTAS = [[4.0, 2.0, 1.0, 0.0], [0.5, 2.0, -1.0, 0.0], [-0.5, 2.0, 4.0, 0.0]]


@pytest.mark.parametrize(
    ("least", "wanted"),
    [(1, [4, 6, 4, 0]), (2, [0, 6, 0, 0]), (3, [0, 6, 0, 0]), (4, [0, 0, 0, 0])],
)
def test_entries_that_too_few_tasks_use_are_left_out(least: int, wanted: list, build: Any) -> None:
    found = learn(build, "consensus", DELTAS, least=least, mask_lambda=0.4, scale=0.5)
    assert entries(found.shared["vector"], 4) == wanted
    for task in (0, 1, 2, None):
        (answer,) = found.compose(task)
        assert entries(answer, 4) == [0.5 * x for x in wanted]


def test_masks_and_vector_are_made_anew_after_each_task(build: Any) -> None:
    """Of the first two alone t is 4.5 4 0 0 and the masks are 1 1 1 0 and 0 1 1 0."""
    found = learn(build, "consensus", DELTAS[:2], mask_lambda=0.4, scale=1.0)
    assert entries(found.compose(0)[0], 4) == [0, 4, 0, 0]
    assert set(found.shared) == {"vector", "chosen"}


def test_it_is_the_sum_under_the_masks_of_tall_mask_in_every_parameter(build: Any) -> None:
    found = learn(build, "consensus", DELTAS, mask_lambda=0.3, scale=0.7)
    masked = learn(build, "tall_mask", DELTAS, mask_lambda=0.3)
    left = 0
    for name in found.base:
        masks = sum(masked.shared["masks"].delta(f"{p.task}/{name}") for p in masked.packs)
        wanted = 0.7 * (masks >= 2) * masked.shared["vector"].delta(name)
        assert torch.equal(found.compose(0)[0].delta(name), wanted), name
        left += int((masks >= 2).sum())
    assert 0 < left < sum(x.numel() for x in found.base.values())


def test_one_task_alone_is_itself(build: Any) -> None:
    alone = learn(build, "consensus", DELTAS[:1])
    assert alone.compose(0) == alone.packs and not alone.shared
    assert entries(alone.compose(None)[0], 4) == DELTAS[0]


def test_the_masks_are_those_that_tall_mask_chooses_and_then_the_scale_is_chosen(
    build: Any, tiny_scenario: Any
) -> None:
    """Brute force over the grid, on the vector under the masks of the other strategy's own choice."""
    found, masked = build("consensus"), build("tall_mask")
    masked.stages = found.stages
    for strategy in (found, masked):
        train(strategy, tiny_scenario)
    masks = masked.shared["masks"]
    for name in found.base:
        both = [masks.delta(f"{p.task}/{name}") for p in masked.packs]
        wanted = both[0] * both[1] * masked.shared["vector"].delta(name)
        assert torch.equal(found.shared["vector"].delta(name), wanted), name
    chosen = original(found.shared["chosen"].tensors["scale"]).item()
    losses = {}
    for scale in module("consensus").GRID:
        fixed = build("consensus", scale=scale)
        fixed.stages = found.stages
        train(fixed, tiny_scenario)
        losses[scale] = sum(
            validation_loss(fixed, fixed.compose(None), t) for t in tiny_scenario.tasks
        )
        fixed.restore_base()
    assert chosen == min(losses, key=losses.__getitem__) and len(set(losses.values())) > 5
    assert NAME in found.shared["vector"].tensors
