"""Joint training: on the examples, and the preference pairs, of all tasks so far."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cl_graft.strategy import union
from cl_graft.task import Pair, Preference, Scenario
from cl_graft.training.preferences import Sampled
from tests.baselines.methods import learn, spied

HALF = Preference(steps=2, batch=4, learning_rate=1e-3)


def preferring(scenario: Scenario, given: tuple[str, ...] = ()) -> Scenario:
    """The scenario with a preference half; tasks that are named have eight pairs of their own."""
    return replace(
        scenario,
        tasks=tuple(
            replace(
                task,
                pairs=[Pair(e.prompt, e.completion, f"no {task.name}") for e in task.train[:8]]
                if task.name in given
                else [],
                training=replace(task.training, preference=HALF),
            )
            for task in scenario.tasks
        ),
    )


def test_a_union_has_the_rows_pairs_and_steps_of_all_by_the_last_ones_recipe(
    tiny_scenario: Scenario,
) -> None:
    first, second = preferring(tiny_scenario, tiny_scenario.task_names).tasks
    both = union([first, second])
    assert (both.name, both.test, both.score) == (second.name, second.test, second.score)
    assert both.train == [*first.train, *second.train]
    assert both.pairs == [*first.pairs, *second.pairs]
    assert both.training.steps == 2 * second.training.steps
    assert both.training.preference == replace(HALF, steps=4)
    assert union([first]) == replace(first, train=list(first.train))


@pytest.mark.parametrize("name", ["joint", "fusellm"])
def test_the_second_stage_learns_the_pairs_of_both_tasks(
    build: Any, tiny_scenario: Scenario, name: str
) -> None:
    scenario = preferring(tiny_scenario, tiny_scenario.task_names)
    strategy = build(name, scenario=scenario)
    asked = spied(strategy)
    learn(strategy, scenario)
    steps = scenario.tasks[1].training.steps
    assert [(a["job"].kind, a["job"].steps) for a in asked[2:]] == [("sft", 2 * steps), ("dpo", 4)]
    pairs = [pair for task in scenario.tasks for pair in task.pairs]
    assert [row["rejected"] for row in asked[3]["rows"]] == [pair.rejected for pair in pairs]


def test_where_a_task_has_no_pairs_its_own_are_sampled_by_its_own_rule(
    build: Any, tiny_scenario: Scenario, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by that of the newest task, on prompts of whatever task."""
    first, second = tiny_scenario.task_names
    scenario = preferring(tiny_scenario, (second,))
    strategy = build("joint", scenario=scenario)
    asked, ranked = spied(strategy), []

    def pairs(_: Any, model: Any, tokenizer: Any, task: Any, *rest: Any) -> Sampled:
        ranked.append(task)
        return Sampled([Pair(e.prompt, e.completion, "sampled") for e in task.train[:3]], 0)

    monkeypatch.setattr(type(strategy.stages), "pairs", pairs)
    learn(strategy, scenario)
    assert ranked == [scenario.tasks[0]] * 2, "in its own stage, and again by the model of both"
    assert [row["rejected"] for row in asked[3]["rows"]] == ["sampled"] * 3 + [f"no {second}"] * 8
