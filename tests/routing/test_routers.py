"""Routers: exact without old data, and what a cell does with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.evaluation.features import Features
from cl_graft.experiment.cell import run
from cl_graft.routing.base import Router
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.stream import benchmark

EVERY = plugins.names("router")
BY_FEATURES = [n for n in EVERY if issubclass(plugins.load("router", n), Router)]


def router(name: str, **options: Any) -> Router:
    return plugins.load("router", name)(**options)


def learned(made: Router, tasks: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {}
    for number, features in enumerate(tasks):
        state = made.update(state, features, number)
    return state


def apart(width: int, tasks: int, rows: int = 40, gap: float = 8.0) -> list[torch.Tensor]:
    """Features of tasks around centres in different directions."""
    torch.manual_seed(0)
    centres = gap * torch.nn.functional.normalize(torch.randn(tasks, width))
    return [centre + 0.3 * torch.randn(rows + 7 * k, width) for k, centre in enumerate(centres)]


@pytest.mark.parametrize("name", BY_FEATURES)
def test_tasks_that_lie_apart_are_told_apart(name: str) -> None:
    made, tasks = router(name), apart(12, 5)
    state = learned(made, tasks)
    for number, features in enumerate(tasks):
        assert made.scores(state, features).argmax(1).tolist() == [number] * len(features)


def test_ridge_by_sums_is_the_batch_solution() -> None:
    """Task after task, in float32 and from half of a symmetric matrix, against one least-squares problem."""
    made, tasks = router("ridge", regularisation=0.05), apart(6, 3, gap=1.0)
    scores = made.scores(learned(made, tasks), tasks[1])
    rows = [torch.cat([x.double(), torch.ones(len(x), 1)], 1) for x in tasks]
    weighted = torch.cat([x / len(x) ** 0.5 for x in rows])
    targets = torch.cat([torch.eye(3)[[k] * len(x)] / len(x) ** 0.5 for k, x in enumerate(rows)])
    gram = weighted.T @ weighted
    strength = 0.05 * gram.diagonal().mean()
    stacked = torch.cat([weighted, strength.sqrt() * torch.eye(7, dtype=torch.float64)])
    wanted = torch.cat([targets.double(), torch.zeros(7, 3, dtype=torch.float64)])
    solution = torch.linalg.lstsq(stacked, wanted).solution
    torch.testing.assert_close(scores, rows[1] @ solution, rtol=1e-4, atol=1e-5)


def test_ridge_keeps_half_of_a_symmetric_matrix_and_a_row_a_task() -> None:
    state = learned(router("ridge"), apart(6, 3))
    assert {n: (x.shape, x.dtype) for n, x in state.items()} == {
        "products": ((7 * 8 // 2,), torch.float32),
        "sums": ((3, 7), torch.float32),
    }


def test_centroids_of_few_prompts_are_the_prompts_and_old_ones_stay() -> None:
    made = router("centroids", per_task=8)
    first, second = torch.eye(4)[:2], torch.eye(4)[2:]
    state = made.update({}, first, 0)
    assert sorted(state["centres"].argmax(1).tolist()) == [0, 1]
    after = made.update(state, second, 1)
    assert torch.equal(after["centres"][:2], state["centres"])
    assert after["owners"].tolist() == [0, 0, 1, 1]
    scores = made.scores(after, torch.tensor([[0, 3.0, 0, 1], [0, 1, 0, 3.0]]))
    assert scores.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("name", BY_FEATURES)
def test_a_state_is_the_same_whenever_it_is_made(name: str) -> None:
    made, tasks = router(name), apart(12, 3)
    one, two = learned(made, tasks), learned(made, tasks)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_features_are_the_mean_of_the_last_hidden_state_whatever_the_batch(nano: Any) -> None:
    model, tokenizer = nano
    prompts = ["Q: Zoe has 5 bags", "def f(x):", "Q:", "Q: Zoe has 5 bags with 2 coins each."]
    found = Features(model, tokenizer)(prompts)
    for prompt, feature in zip(prompts, found, strict=True):
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(feature, hidden.mean(0), rtol=1e-4, atol=1e-5)


# --- a strategy with a router ---


def built(nano: Any, scenario: Any, name: str = "magnitude", budget: str = "30%", **more: Any):
    model, tokenizer = nano
    kind = plugins.load("strategy", name)
    return kind(
        model=model,
        tokenizer=tokenizer,
        scenario=scenario,
        budget=Budget(budget, sum(p.numel() for p in model.parameters())),
        seed=0,
        options=plugins.options(kind),
        **more,
    )


def test_each_prompt_is_answered_by_the_pack_it_is_taken_for(nano, tiny_scenario, monkeypatch):
    """A router that is half wrong: outcomes are those of the packs chosen, example by example."""
    strategy = built(nano, tiny_scenario, router=router("centroids"))
    told = built(nano, tiny_scenario, budget="30%")
    for experience in benchmark(tiny_scenario).train_stream:
        strategy.train(experience, eval_streams=[])
    task = tiny_scenario.tasks[0]
    choice = [index % 2 for index in range(len(task.test))]
    wrong = torch.eye(2)[choice]
    monkeypatch.setattr(strategy.router, "judge", lambda state, prompts, view: wrong)
    mixed = strategy.measure(task, 0)
    answered = strategy.answered[task.name]
    names = [tiny_scenario.task_names[k] for k in choice]
    assert answered.names == names and answered.counts == {n: names.count(n) for n in names}
    told.packs = strategy.packs
    alone = [[told.measure(task, k)[task.score][i] for i in range(len(choice))] for k in (0, 1)]
    assert [o.answer for o in mixed[task.score]] == [
        alone[k][i].answer for i, k in enumerate(choice)
    ]
    again = strategy.measure(task, 0)
    assert again is mixed, "what was measured is not measured again"


def test_the_routers_bytes_are_taken_from_the_budget(nano, tiny_scenario):
    strategy = built(nano, tiny_scenario, router=router("ridge"))
    free = built(nano, tiny_scenario)
    for number, experience in enumerate(benchmark(tiny_scenario).train_stream, 1):
        for each in (strategy, free):
            each.train(experience, eval_streams=[])
        alive = sum(pack.nbytes for pack in strategy.alive)
        assert alive <= strategy.budget.bytes * number
        assert strategy.shared["router"].nbytes > 1000
    assert strategy.packs[0].nbytes < free.packs[0].nbytes <= free.budget.bytes


def test_methods_whose_packs_answer_every_task_need_no_router(nano, tiny_scenario):
    strategy = built(nano, tiny_scenario, "sequential", router=router("ridge"))
    strategy.train(benchmark(tiny_scenario).train_stream[0], eval_streams=[])
    assert strategy.router is None and not strategy.shared
    strategy.measure(tiny_scenario.tasks[0], 0)
    assert strategy.answered["math"].counts == {}


# --- a cell ---

SMALL = {
    "steps": 6,
    "batch": 8,
    "train_size": 48,
    "test_size": 12,
    "tasks": "math,cipher",
}


def config(out: Path, **fields: Any) -> RunConfig:
    return RunConfig(
        scenario="mini",
        strategy="magnitude",
        model="nano-llama",
        budget="30%",
        options={"mini": SMALL},
        out=out,
        wandb="off",
        **fields,
    )


def test_a_cell_records_what_every_example_was_taken_for(tmp_path):
    given = run(config(tmp_path))
    inferred = run(config(tmp_path, task_ids="inferred"))
    assert given["config"]["strategy"] == inferred["config"]["strategy"]
    assert given["routing"][-1]["math"] == {"math": 12}
    assert given["routing"][1]["cipher"] == {"": 12}, "not learned yet: the base answers"
    assert set(inferred["shared_bytes"]) == {"router"} and given["shared_bytes"] == {}
    last = inferred["routing"][-1]
    assert sum(last["math"].values()) == sum(last["cipher"].values()) == 12
    assert "" not in last["math"] | last["cipher"]
    folder = tmp_path / config(tmp_path, task_ids="inferred").cell
    lines = (folder / "experiences" / "02" / "examples.jsonl").read_text().splitlines()
    taken = [x["taken_for"] for x in map(json.loads, lines) if x["task"] == "math"]
    assert {n: taken.count(n) for n in set(taken)} == last["math"]
    (shared,) = (folder / "packs" / "shared").iterdir()
    assert shared.name == "02-router.safetensors"
    assert SkillPack.load(shared).nbytes == inferred["shared_bytes"]["router"]
    assert sum(inferred["pack_bytes"]) + shared.stat().st_size == inferred["alive_bytes"][-1]


def test_a_cell_with_a_router_goes_on_where_it_was_stopped(tmp_path):
    import shutil

    whole = run(config(tmp_path / "whole", task_ids="inferred", router="centroids"))
    cell = config(tmp_path / "cut", task_ids="inferred", router="centroids")
    folder = tmp_path / "cut" / cell.cell
    shutil.copytree(tmp_path / "whole" / cell.cell, folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "experiences" / "02")
    (folder / "packs" / "shared" / "02-router.safetensors").unlink()
    (folder / "packs" / "02-cipher.safetensors").unlink()
    with pytest.raises(CLGraftError, match="01-router.safetensors"):
        run(cell)  # what the first experience left is gone: said, not computed from nothing
    shutil.rmtree(folder / "experiences" / "01")
    again = run(cell)
    for part in ("matrix", "routing", "pack_bytes", "alive_bytes", "shared_bytes"):
        assert again[part] == whole[part]


def test_an_unknown_router_or_option_is_answered_before_anything_is_computed(tmp_path, call):
    words = [
        "plan",
        "--scenarios",
        "mini",
        "--strategies",
        "magnitude",
        "--task-ids",
        "inferred",
    ]
    done = call(*words, "--router", "rigde")
    assert done.code and "ridge" in done.err
    done = call(*words, "--set", "ridge.regularization=1")
    assert done.code and "regularisation" in done.err
    assert call(*words, "--set", "ridge.regularisation=0.1").code == 0
