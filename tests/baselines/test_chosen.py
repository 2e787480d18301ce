"""Factors of merging methods are chosen on validation data, and one task alone is itself."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from cl_graft.skillpack.codecs import exact, original
from cl_graft.strategy.choose import validation_loss
from cl_graft.strategy.context import validation
from cl_graft.strategy.tall import LAMBDAS
from tests.baselines.methods import learn


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "pcb", "knots"])
def test_one_task_alone_is_itself(name: str, build: Any, tiny_scenario: Any) -> None:
    """Neither scaled nor trimmed: the model answers as the tuned one does."""
    strategy = learn(build(name), tiny_scenario, 1)
    assert strategy.compose(0) == strategy.packs and not strategy.shared
    strategy.grafted.activate(strategy.compose(0))
    for parameter, weight in strategy.model.named_parameters():
        tuned = strategy.base[parameter] + strategy.packs[0].delta(parameter)
        assert torch.equal(weight, tuned), parameter


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "pcb", "knots"])
def test_the_scale_is_the_one_of_the_grid_under_which_both_tasks_lose_least(
    name: str, build: Any, tiny_scenario: Any
) -> None:
    """Brute force: every scale of the grid as an option of its own, on the same two packs."""
    strategy = learn(build(name), tiny_scenario)
    chosen = original(strategy.shared["chosen"].tensors["scale"]).item()
    losses = {}
    for scale in sys.modules[type(strategy).__module__].GRID:
        fixed = build(name, scale=scale)
        fixed.packs, fixed.grafted, fixed.model = strategy.packs, strategy.grafted, strategy.model
        told = {"scale": exact(torch.tensor(scale, dtype=torch.float64))}
        fixed.shared = strategy.shared | {"chosen": strategy._pack(tiny_scenario.tasks[0], told)}
        tasks = tiny_scenario.tasks
        losses[scale] = sum(validation_loss(fixed, fixed.compose(None), t) for t in tasks)
        if scale == chosen:
            assert fixed.compose(0)[0].digest == strategy.compose(0)[0].digest
    strategy.grafted.unload()
    assert chosen == min(losses, key=losses.__getitem__) and len(set(losses.values())) > 5


def test_a_validation_loss_is_that_of_the_answers_tokens_of_rows_nothing_trains_on(
    build: Any, tiny_scenario: Any
) -> None:
    """Worked out from the model's own log-probabilities, a batch at a time."""
    strategy, task = build("individual"), tiny_scenario.tasks[0]
    assert not {e.prompt for e in task.validation} & {e.prompt for e in task.train}
    wanted = []
    for batch in validation(strategy.model.eval(), strategy.tokenizer, task, 32):
        logs = strategy.model(batch["input_ids"], batch["attention_mask"]).logits.log_softmax(-1)
        asked = batch["labels"][:, 1:]
        told = logs[:, :-1].gather(-1, asked.clamp_min(0)[..., None])[..., 0]
        wanted.append(-told[asked != -100].mean().item())
    found = validation_loss(strategy, [], task)
    assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-5)


def test_each_task_has_the_lambda_under_which_it_loses_least(
    build: Any, tiny_scenario: Any
) -> None:
    strategy = learn(build("tall_mask"), tiny_scenario)
    for number, task in enumerate(tiny_scenario.tasks):
        losses = []
        for x in LAMBDAS:
            fixed = build("tall_mask", mask_lambda=x)
            fixed.stages = strategy.stages
            learn(fixed, tiny_scenario)
            losses.append(validation_loss(fixed, fixed.compose(number), task))
            fixed.restore_base()
        found = validation_loss(strategy, strategy.compose(number), task)
        strategy.grafted.unload()
        assert found == min(losses) and len(set(losses)) > 1


def test_a_run_that_goes_on_answers_with_the_scale_that_was_chosen(
    build: Any, tiny_scenario: Any
) -> None:
    whole, again = learn(build("task_arithmetic"), tiny_scenario), build("task_arithmetic")
    again.packs, again.shared = list(whole.packs), dict(whole.shared)
    assert again.compose(1)[0].digest == whole.compose(1)[0].digest
    assert whole.alive[-1] is whole.shared["chosen"]
