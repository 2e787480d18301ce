"""The short forms most methods are written in: a function of one delta, or of all tasks' deltas of a parameter."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.composed import Deltas, compose
from cl_graft.strategy.base import Keeps, Strategy
from cl_graft.strategy.context import Context
from cl_graft.task import Task

Compress = Callable[..., dict[str, Encoded]]
Merge = Callable[..., Tensor]
Statistic = Callable[..., Any]


def compressor(
    keeps: Keeps | Mapping[str, Keeps] = "per_task", budgeted: bool = True
) -> Callable[[Compress], type[Strategy]]:
    """Short form: `f(delta, context, *, options) -> encoded tensors` becomes a strategy of that name.

    delta: parameter name -> float32 tensor, tuned minus where training started. keeps: as of Strategy; of a method
    with several forms {value of its option `convention`: how that one keeps}.
    """

    def make(function: Compress) -> type[Strategy]:
        def learn(self: Strategy, task: Task, context: Context, **options: Any):
            return function(context.delta(self.teach(self.model, task)), context, **options)

        return _strategy(function, learn, keeps=keeps, budgeted=budgeted)

    return make


def merger(
    function: Merge | None = None, *, statistic: Statistic | None = None
) -> type[Strategy] | Callable[[Merge], type[Strategy]]:
    """Short form: `f(deltas, *, options) -> delta` becomes a strategy that merges all tasks seen into one.

    deltas: a parameter's delta of every task, float32 tensors of one shape; what is returned is the merged one. Only
    one parameter's are in memory at a time. statistic: `g(delta, *, options)` of a task's whole delta, {parameter
    name: tensor} decoded as it is read, returns a plain number (a threshold over all parameters); f is then given the
    tasks' numbers second, `f(deltas, statistics, *, options)`. What is kept is each task's delta in bf16, since
    merging anew needs them all.
    """

    def make(function: Merge) -> type[Strategy]:
        def learn(self: Strategy, task: Task, context: Context, **options: Any):
            return context.dense(context.delta(self.teach(self.model, task)))

        def compose_all(self: Strategy, task: int | None) -> Sequence[SkillPack]:
            if not self.packs:
                return []
            told = dict(self.options)
            if statistic is not None:
                told["statistics"] = [_statistic(self, statistic, pack) for pack in self.packs]
            return [compose(merged, self.packs, self.packs[0].shapes, **told)]

        def merged(name: str, *packs: SkillPack, **told: Any) -> Tensor:
            more = [told.pop("statistics")] if statistic is not None else []
            return function([pack.delta(name) for pack in packs], *more, **told)

        merged.__module__, merged.__qualname__ = function.__module__, function.__qualname__
        return _strategy(function, learn, compose=compose_all, keeps="merged", budgeted=False)

    return make if function is None else make(function)


def _statistic(strategy: Strategy, statistic: Statistic, pack: SkillPack) -> Any:
    """The number of a pack's delta, computed once."""
    known = strategy.__dict__.setdefault("statistics", {})
    if pack.digest not in known:
        wanted = inspect.signature(statistic).parameters
        told = {name: value for name, value in strategy.options.items() if name in wanted}
        known[pack.digest] = statistic(Deltas(pack), **told)
    return known[pack.digest]


def _strategy(function: Callable[..., Any], learn: Any, **members: Any) -> type[Strategy]:
    learn.pure = True  # it trains by the recipe alone, so that all such methods share a stage
    return type(
        function.__name__,
        (Strategy,),
        {
            **members,
            "learn": learn,
            "function": staticmethod(function),
            "__doc__": function.__doc__,
            "__module__": function.__module__,
        },
    )
