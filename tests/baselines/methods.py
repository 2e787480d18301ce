"""What tests of methods that train in their own way share."""

from __future__ import annotations

import sys
from typing import Any

from cl_graft import plugins
from cl_graft.stream import benchmark


def module(name: str) -> Any:
    """The file of a baseline."""
    return sys.modules[plugins.load("strategy", name).__module__]


def learn(strategy: Any, scenario: Any, experiences: int = 2) -> Any:
    """The strategy, having learned so many of the scenario's tasks."""
    for experience in list(benchmark(scenario).train_stream)[:experiences]:
        strategy.train(experience, eval_streams=[])
    return strategy


def spied(strategy: Any) -> list[dict[str, Any]]:
    """What every stage of the strategy is asked for, from here on: rows, job and terms."""
    asked: list[dict[str, Any]] = []
    run = type(strategy.stages).run

    class Spy(type(strategy.stages)):  # type: ignore[misc]
        def run(self, model, tokenizer, rows, job, progress, terms, origin):  # type: ignore[no-untyped-def]
            folder, log = run(self, model, tokenizer, rows, job, progress, terms, origin)
            asked.append({"rows": rows, "job": job, "terms": terms, "folder": folder, "log": log})
            return folder, log

    strategy.stages = Spy(**vars(strategy.stages))
    return asked
