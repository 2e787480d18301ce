"""Tasks as an Avalanche benchmark. The only module that imports Avalanche (it takes seconds)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from avalanche.benchmarks import CLScenario, benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute
    from avalanche.core import SupervisedPlugin
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.plugins.clock import Clock
    from avalanche.training.templates.base import BaseTemplate

from cl_graft.task import Example, Scenario

__all__ = [
    "BaseTemplate",
    "CLScenario",
    "Clock",
    "EvaluationPlugin",
    "SupervisedPlugin",
    "benchmark",
]


class Rows:
    """The examples of one task as the indexable that Avalanche wants, optionally encoded as (x, y)."""

    def __init__(self, examples: Sequence[Example], encode: Callable[[Example], Any] | None):
        self.examples, self.encode = examples, encode

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Any:
        example = self.examples[index]
        return self.encode(example) if self.encode else asdict(example)


def benchmark(
    scenario: Scenario, encode: Callable[[Example], tuple[Any, ...]] | None = None
) -> CLScenario:
    """An Avalanche scenario with `train_stream` and `test_stream`, one experience a task.

    An item is the example as a dict; `encode` maps an example to what another strategy wants instead,
    such as `(input_ids, target)` for Avalanche's own supervised strategies.
    """

    def dataset(examples: Sequence[Example], label: int) -> AvalancheDataset:
        rows = Rows(examples, encode)
        targets = [0] * len(rows) if encode is None else [rows[i][1] for i in range(len(rows))]
        attributes = [
            DataAttribute(
                ConstantSequence(label, len(rows)), "targets_task_labels", use_in_getitem=True
            ),
            DataAttribute(targets, "targets"),
        ]
        return AvalancheDataset([rows], data_attributes=attributes if encode else attributes[:1])

    tasks = list(enumerate(scenario.tasks))
    return benchmark_from_datasets(
        train=[dataset(task.train, i) for i, task in tasks],
        test=[dataset(task.test, i) for i, task in tasks],
    )
