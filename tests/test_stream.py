"""Our scenarios are Avalanche's, and our strategies are driven and measured by Avalanche's own code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from avalanche.benchmarks import CLScenario
from avalanche.evaluation.metrics import accuracy_metrics, bwt_metrics, forgetting_metrics
from avalanche.training import Naive

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.matrix import PerformanceMatrix
from cl_graft.stream import EvaluationPlugin, benchmark


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
