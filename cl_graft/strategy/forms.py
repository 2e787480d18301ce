"""The short forms most methods are written in: a function of the delta, or of all tasks' deltas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from cl_graft.skillpack.codecs import Encoded, dense
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.strategy.base import Keeps, Strategy
from cl_graft.strategy.context import Context
from cl_graft.task import Task
from cl_graft.training.delta import Delta

Compress = Callable[..., dict[str, Encoded]]
Merge = Callable[..., Delta]


def compressor(
    keeps: Keeps = "per_task", budgeted: bool = True
) -> Callable[[Compress], type[Strategy]]:
    """Short form: `f(delta, context, *, options) -> encoded tensors` becomes a strategy of that name.

    delta: parameter name -> float32 tensor, tuned minus where training started.
    """

    def make(function: Compress) -> type[Strategy]:
        def learn(self: Strategy, task: Task, context: Context, **options: Any):
            return function(self.fine_tune(task, context), context, **options)

        return _strategy(function, {"learn": learn, "keeps": keeps, "budgeted": budgeted})

    return make


def merger(function: Merge) -> type[Strategy]:
    """Short form: `f(deltas, *, options) -> delta` becomes a strategy that merges all tasks seen into one.

    deltas: one mapping of parameter name -> float32 tensor a task. What is kept is each task's delta in
    bf16, since merging anew needs them all.
    """

    def learn(self: Strategy, task: Task, context: Context, **options: Any):
        return context.dense(self.fine_tune(task, context))

    def active(self: Strategy, task: int | None) -> list[SkillPack]:
        if not self.packs:
            return []
        merged = function([pack.decode() for pack in self.packs], **self.options)
        tensors = {n: dense(x, torch.float32) for n, x in merged.items()}
        return [replace(self.packs[-1], tensors=tensors)]

    return _strategy(
        function, {"learn": learn, "active": active, "keeps": "merged", "budgeted": False}
    )


def _strategy(function: Callable[..., Any], members: dict[str, Any]) -> type[Strategy]:
    return type(
        function.__name__,
        (Strategy,),
        {
            **members,
            "function": staticmethod(function),
            "__doc__": function.__doc__,
            "__module__": function.__module__,
        },
    )
