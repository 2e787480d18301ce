"""What methods of many tasks hold at once: a few tensors of one parameter, never a model's."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from cl_graft.skillpack.codecs import dense
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.composed import Deltas
from cl_graft.strategy import Context
from cl_graft.task import Example, Task
from tests.live import Live

SHAPE, PARAMETERS, TASKS = (64, 48), 40, 5
# factors that need no validation
FIXED: dict[str, dict[str, float]] = {
    "tall_mask": {"mask_lambda": 0.4},
    "ties": {"scale": 1.0},
    "task_arithmetic": {"scale": 0.4},
    "emr": {},
    "sce": {},
}


def drawn(task: int) -> SkillPack:
    seed = torch.Generator().manual_seed(task)
    tensors = {f"w{n}": dense(torch.randn(SHAPE, generator=seed)) for n in range(PARAMETERS)}
    return SkillPack(tensors, f"task-{task}", "m", {}, "0" * 32)


class Told(Context):
    """A context of which a method asks nothing but an encoding."""

    def __init__(self) -> None:
        return


@pytest.fixture
def learned(build):
    """A strategy of four packs that learns a fifth: it, and the most that it held of each of the two halves."""

    def make(name: str) -> tuple[Any, int]:
        strategy = build(name, **FIXED[name])
        strategy.packs = [drawn(task) for task in range(TASKS - 1)]
        strategy.fine_tune = lambda task, context: Deltas(drawn(TASKS))
        rows = (Example("1+1=", "2"),)
        task = Task(f"task-{TASKS - 1}", rows, rows, "exact")
        with Live(SHAPE[0] * SHAPE[1]) as live:
            kept = strategy.learn(task, Told(), **strategy.options)
        strategy.packs.append(drawn(TASKS - 1))
        strategy.shared = {n: strategy._pack(task, tensors) for n, tensors in kept.shared.items()}
        return strategy, live.peak

    return make


@pytest.mark.parametrize(("name", "tensors"), [("tall_mask", 5), ("emr", 5)])
def test_a_vector_and_its_masks_are_made_and_put_together_parameter_by_parameter(
    name, tensors, learned
):
    strategy, peak = learned(name)
    assert 1 < peak <= tensors
    with Live(SHAPE[0] * SHAPE[1]) as live:
        for task in range(TASKS):
            for parameter in (pack := strategy.compose(task)[0]).tensors:
                pack.delta(parameter)
    assert 1 < live.peak <= 4


@pytest.mark.parametrize("name", ["ties", "task_arithmetic", "sce"])
def test_a_merged_delta_takes_its_parameters_deltas_and_a_few_more(name, build, monkeypatch):
    strategy = build(name, **FIXED[name])
    strategy.packs = [drawn(task) for task in range(TASKS)]
    monkeypatch.setattr(sys.modules[type(strategy).__module__], "PART", 100, raising=False)
    with Live(SHAPE[0] * SHAPE[1]) as live:
        (merged,) = strategy.compose(0)
        for parameter in merged.tensors:
            merged.delta(parameter)
    assert TASKS <= live.peak <= TASKS + 3
