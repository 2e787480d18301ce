"""Our scenarios are Avalanche's, and our strategies are driven and measured by Avalanche's own code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from avalanche.benchmarks import CLScenario
from avalanche.evaluation.metrics import accuracy_metrics, bwt_metrics, forgetting_metrics
from avalanche.training import Naive
from avalanche.training import plugins as avalanches
from avalanche.training.storage_policy import ReservoirSamplingBuffer

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.errors import CLGraftError
from cl_graft.matrix import PerformanceMatrix
from cl_graft.stream import CALLED, EvaluationPlugin, SupervisedPlugin, benchmark


def test_a_scenario_becomes_avalanche_streams_with_one_experience_a_task(tiny_scenario):
    made = benchmark(tiny_scenario)
    assert isinstance(made, CLScenario)
    assert [len(e.dataset) for e in made.train_stream] == [48, 48]
    assert made.test_stream[1].dataset[0]["prompt"] == tiny_scenario.tasks[1].test[0].prompt


def test_avalanches_own_naive_strategy_trains_on_our_scenario(tiny_scenario, nano):
    """Read the prompt, predict the answer's first token: a supervised problem for Avalanche's own loop."""
    _, tokenizer = nano

    def encode(example):
        ids = tokenizer(example.prompt)["input_ids"][-24:]
        ids = [0] * (24 - len(ids)) + ids
        return torch.tensor(ids), tokenizer(example.completion, add_special_tokens=False)[
            "input_ids"
        ][0]

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Embedding(len(tokenizer), 16),
        torch.nn.Flatten(),
        torch.nn.Linear(16 * 24, len(tokenizer)),
    )
    metrics = EvaluationPlugin(accuracy_metrics(experience=True), loggers=[])
    naive = Naive(
        model=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        train_mb_size=16,
        train_epochs=20,
        evaluator=metrics,
    )
    made = benchmark(tiny_scenario, encode)
    naive.train(made.train_stream[0], num_workers=0)
    naive.eval(made.train_stream[:1], num_workers=0)
    (accuracy,) = [v for k, v in metrics.get_last_metrics().items() if "Top1_Acc_Exp" in k]
    assert accuracy > 0.9


def with_one_answer_a_task(scenario):
    """Learned within a few steps whatever the machine, and lost as soon as the next task's answer is learned."""

    def same(task, examples):
        return tuple(replace(e, completion=task.train[0].completion) for e in examples)

    tasks = [replace(t, train=same(t, t.train), test=same(t, t.test)) for t in scenario.tasks]
    return replace(scenario, tasks=tuple(tasks))


@pytest.mark.parametrize("name", ["sequential", "graftllm"])
def test_avalanches_forgetting_of_our_strategy_is_our_matrixs(name, nano, tiny_scenario):
    model, tokenizer = nano
    scenario = with_one_answer_a_task(tiny_scenario).with_training(steps=60)
    evaluator = EvaluationPlugin(
        accuracy_metrics(experience=True),
        forgetting_metrics(experience=True, stream=True),
        bwt_metrics(stream=True),
        loggers=[],
        strict_checks=False,
    )
    found = plugins.load("strategy", name)
    strategy = found(
        model=model,
        tokenizer=tokenizer,
        scenario=scenario,
        budget=Budget("10%", sum(p.numel() for p in model.parameters())),
        seed=0,
        options=plugins.options(found),
        plugins=[evaluator],
    )
    made, rows = benchmark(scenario), []

    def measure():
        strategy.eval(made.test_stream)
        rows.append(
            [
                sum(o.score for o in strategy.results[t.name][t.score]) / len(t.test)
                for t in scenario.tasks
            ]
        )

    measure()
    for experience in made.train_stream:
        strategy.train(experience, eval_streams=[])
        measure()
    matrix = PerformanceMatrix(rows, tasks=scenario.task_names)
    theirs = evaluator.get_last_metrics()
    (forgetting,) = [v for k, v in theirs.items() if k.startswith("StreamForgetting")]
    (bwt,) = [v for k, v in theirs.items() if k.startswith("StreamBWT")]
    accuracies = [v for k, v in theirs.items() if k.startswith("Top1_Acc_Exp")]
    assert accuracies == pytest.approx(rows[-1])
    assert forgetting == pytest.approx(matrix.avalanche_forgetting())
    assert bwt == pytest.approx(matrix.bwt())
    if name == "graftllm":
        assert forgetting == 0.0
    else:
        assert rows[1][0] > 0, "the task was not learned, so the test shows nothing"


def build_with(nano, scenario, *with_plugins, name="sequential"):
    model, tokenizer = nano
    found = plugins.load("strategy", name)
    return found(
        model=model,
        tokenizer=tokenizer,
        scenario=scenario,
        budget=Budget("10%", sum(p.numel() for p in model.parameters())),
        seed=0,
        options=plugins.options(found),
        plugins=with_plugins,
    )


def test_avalanches_replay_gives_our_strategies_their_data(nano, tiny_scenario):
    """Its buffer is filled after the first experience, and half of the second one's rows come from it."""
    replay = avalanches.ReplayPlugin(mem_size=8, storage_policy=ReservoirSamplingBuffer(max_size=8))
    strategy, rows = build_with(nano, tiny_scenario, replay), []
    run = strategy.stages.run

    class Spied:
        def run(self, model, tokenizer, given, *more):
            rows.append(list(given))
            return run(model, tokenizer, given, *more)

    strategy.stages = Spied()
    first, second = benchmark(tiny_scenario).train_stream
    tasks = [{(e.prompt, e.completion) for e in task.train} for task in tiny_scenario.tasks]
    strategy.train(first, eval_streams=[])
    assert {(r["prompt"], r["completion"]) for r in rows[0]} == tasks[0] and len(rows[0]) == 48
    kept = {(x["prompt"], x["completion"]) for x in replay.storage_policy.buffer}
    assert len(kept) == 8 and kept <= tasks[0]
    strategy.train(second, eval_streams=[])
    seen = [(r["prompt"], r["completion"]) for r in rows[1]]
    old = [row for row in seen if row in tasks[0]]
    assert {row for row in seen if row in tasks[1]} == tasks[1]
    assert set(old) == kept and len(old) == len(seen) // 2


def test_hooks_are_called_in_avalanches_order(nano, tiny_scenario):
    told = []

    class Listens(SupervisedPlugin):
        pass

    for name in CALLED:
        setattr(Listens, name, lambda self, strategy, name=name, **kwargs: told.append(name))
    strategy, made = build_with(nano, tiny_scenario, Listens()), benchmark(tiny_scenario)
    strategy.train(made.train_stream[0], eval_streams=[])
    training = ["before_training", "before_training_exp", "after_training_exp", "after_training"]
    assert told == training
    told.clear()
    strategy.eval(made.test_stream)
    each = ["before_eval_exp", "before_eval_iteration", "after_eval_iteration", "after_eval_exp"]
    assert told == ["before_eval", *each, *each, "after_eval"]


@pytest.mark.parametrize(
    ("plugin", "says"),
    [
        (lambda: avalanches.EWCPlugin(0.4), "EWCPlugin.*before_backward.*'ewc'"),
        (lambda: avalanches.LwFPlugin(), "LwFPlugin.*'lwf'"),
        (lambda: avalanches.AGEMPlugin(4, 4), "AGEMPlugin.*'agem'"),
        (lambda: avalanches.GDumbPlugin(8), "GDumbPlugin.*train_dataset_adaptation.*term"),
        (
            lambda: EvaluationPlugin(accuracy_metrics(minibatch=True), loggers=[]),
            "training goes on",
        ),
        (lambda: EvaluationPlugin(accuracy_metrics(epoch=True), loggers=[]), "training goes on"),
    ],
)
def test_a_plug_in_that_could_not_act_is_refused_in_one_sentence(plugin, says, nano, tiny_scenario):
    with pytest.raises(CLGraftError, match=says) as caught:
        build_with(nano, tiny_scenario, plugin())
    assert "\n" not in str(caught.value)
