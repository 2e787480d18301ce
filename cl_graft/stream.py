"""Tasks as an Avalanche benchmark, and which of its plug-ins act. The only module that imports Avalanche (seconds).

TRL trains and our scorers score, so a plug-in acts where its hooks have a meaning: before and after training and each
experience (where it may give the data, as ReplayPlugin does), before and after an evaluation and each experience of
it, and around an experience's scores, which count as one batch. Hooks within training are never called: a plug-in that
needs one is refused, with the strategy of ours that does the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from typing import Any

from cl_graft.errors import matched_torchvision

with matched_torchvision(), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from avalanche.benchmarks import CLScenario, benchmark_from_datasets
    from avalanche.benchmarks.utils import AvalancheDataset, ConstantSequence, DataAttribute
    from avalanche.core import SupervisedPlugin
    from avalanche.training.plugins import EvaluationPlugin
    from avalanche.training.plugins.clock import Clock
    from avalanche.training.templates.base import BaseTemplate

from cl_graft.errors import CLGraftError
from cl_graft.task import Example, Scenario

CALLED = {
    f"{when}_{what}"
    for when in ("before", "after")
    for what in ("training", "training_exp", "eval", "eval_exp", "eval_iteration")
}
OURS = {  # plug-ins of Avalanche's whose method is a strategy here
    "AGEMPlugin": "agem",
    "EWCPlugin": "ewc",
    "LwFPlugin": "lwf",
}

__all__ = [
    "BaseTemplate",
    "CLScenario",
    "Clock",
    "EvaluationPlugin",
    "SupervisedPlugin",
    "benchmark",
    "check_plugins",
    "drawn",
]


def check_plugins(plugins: Sequence[Any]) -> None:
    """Raises CLGraftError, in one sentence, for a plug-in with a hook that is never called here.

    Of an EvaluationPlugin, for a metric that is computed while training goes on.
    """
    for plugin in plugins:
        if isinstance(plugin, EvaluationPlugin):
            _check_metrics(plugin)
            continue
        name = type(plugin).__name__
        never = sorted(set(_hooks(plugin)) - CALLED)
        if never:
            cure = f"the strategy {OURS[name]!r}" if name in OURS else "a strategy with a term"
            raise CLGraftError(
                f"Avalanche's {name} acts in {', '.join(never)}, which are never called here because TRL trains; leave "
                f"it out, and use {cure} instead (docs/concepts.md, Avalanche)."
            )


def _check_metrics(plugin: EvaluationPlugin) -> None:
    for metric in plugin.metrics:
        if getattr(metric, "_mode", "eval") == "train":
            raise CLGraftError(
                f"the metric {metric} is computed while training goes on, where nothing of Avalanche's is called; ask "
                "for it by experience or stream, as accuracy_metrics(experience=True)."
            )


def _hooks(plugin: Any) -> list[str]:
    """The hooks that a plug-in has of its own."""
    kind = type(plugin)
    return [
        name
        for name in dir(kind)
        if name.startswith(("before_", "after_"))
        and getattr(kind, name) is not getattr(SupervisedPlugin, name, None)
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
        if encode:
            return AvalancheDataset([rows], data_attributes=attributes)
        # a batch is a list of examples, whose fields are of different lengths
        return AvalancheDataset([rows], data_attributes=attributes[:1], collate_fn=list)

    tasks = list(enumerate(scenario.tasks))
    return benchmark_from_datasets(
        train=[dataset(task.train, i) for i, task in tasks],
        test=[dataset(task.test, i) for i, task in tasks],
    )


def drawn(loader: Any) -> tuple[Example, ...]:
    """The examples of one pass of a data loader that a plug-in has put in the place of an experience's own.

    loader: of batches that are lists of examples as dicts, as the datasets of `benchmark` make them.
    """
    wanted = {field.name for field in fields(Example)}
    rows = (row for batch in loader for row in batch)
    return tuple(Example(**{name: x for name, x in row.items() if name in wanted}) for row in rows)
