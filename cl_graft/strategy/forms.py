"""The short forms most methods are written in: a function of one delta, or of all tasks' deltas of a parameter."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_graft import plugins
from cl_graft.errors import AuthorMistake
from cl_graft.models.roles import ROLES, Role
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.codecs.exact import exact, original
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.composed import Deltas, compose
from cl_graft.strategy.base import Strategy
from cl_graft.strategy.choose import validation_loss
from cl_graft.strategy.context import Context
from cl_graft.strategy.kept import Keeps, Kept
from cl_graft.task import Task

Compress = Callable[..., dict[str, Encoded]]
Merge = Callable[..., Tensor]
Statistic = Callable[..., Any]
Check = Callable[..., Any]
CHOSEN = "chosen"  # the shared artefact of options that validation chose


def compressor(
    keeps: Keeps | Mapping[str, Keeps] = "per_task",
    budgeted: bool = True,
    check: Check | None = None,
    touches: Collection[Role] = ROLES,
) -> Callable[[Compress], type[Strategy]]:
    """Short form: `f(delta, context, *, options) -> encoded tensors` becomes a strategy of that name.

    delta: parameter name -> float32 tensor, tuned minus where training started, of all that the method touches. keeps:
    as of Strategy; of a method with several forms {value of its option `convention`: how that one keeps}. check:
    `g(context, *, options)` refuses options that the model's shapes or the budget do not allow, as of Strategy; it
    names those that it looks at. touches: as of Strategy.
    """

    def make(function: Compress) -> type[Strategy]:
        plugins.require_call(function, "delta, context")

        def learn(self: Strategy, task: Task, context: Context, **options: Any):
            return function(context.delta(self.teach(self.model, task)), context, **options)

        def possible(self: Strategy, context: Context, **options: Any) -> None:
            if check is not None:
                check(context, **_wanted(check, options))

        return _strategy(
            function, learn, keeps=keeps, budgeted=budgeted, check=possible, touches=touches
        )

    return make


def merger(
    function: Merge | None = None,
    *,
    statistic: Statistic | None = None,
    grid: Mapping[str, Sequence[float]] | None = None,
) -> type[Strategy] | Callable[[Merge], type[Strategy]]:
    """Short form: `f(deltas, *, options) -> delta` becomes a strategy that merges all tasks seen into one.

    deltas: a parameter's delta of every task, float32 tensors of one shape; what is returned is the merged one. Only
    one parameter's are in memory at a time; one task alone is itself, and f is not asked. statistic: `g(delta, *,
    options)` of a task's whole delta, {parameter name: tensor} decoded as it is read, returns a plain number (a
    threshold over all parameters); f is then given the tasks' numbers second, `f(deltas, statistics, *, options)`.
    grid: {option: its values}; where the option is None, the value is taken under which the tasks seen lose least on
    their validation, the mean over tasks (choose.py), and kept as the shared artefact `chosen`. What is kept is each
    task's delta in bf16, since merging anew needs them all.
    """

    def make(function: Merge) -> type[Strategy]:
        plugins.require_call(function, "deltas" if statistic is None else "deltas, statistics")

        def learn(self: Strategy, task: Task, context: Context, **options: Any):
            own = context.dense(context.delta(self.teach(self.model, task)))
            return chosen(self, [*self.held, self._pack(task, own)], own, options)

        def unlearn(self: Strategy, task: Task, context: Context, **options: Any):
            return chosen(self, [p for p in self.held if p.task != task.unlearns], {}, options)

        def chosen(
            self: Strategy, packs: Sequence[SkillPack], own: Any, options: Mapping[str, Any]
        ):
            free = {n: values for n, values in (grid or {}).items() if options[n] is None}
            if not free or len(packs) < 2:
                return own
            self.restore_base()
            names = {pack.task for pack in packs}
            tasks = [task for task in self.scenario.tasks if task.name in names]
            tried = [dict(zip(free, v, strict=True)) for v in itertools.product(*free.values())]

            def lost(values: dict[str, float]) -> float:
                merged = made(self, packs, {**options, **values})
                return sum(validation_loss(self, merged, seen) for seen in tasks)

            best = min(tried, key=lost)
            self.grafted.unload()
            told = {n: exact(torch.tensor(v, dtype=torch.float64)) for n, v in best.items()}
            return Kept(own, {CHOSEN: told})

        def made(self: Strategy, packs: Sequence[SkillPack], options: Mapping[str, Any]):
            told = dict(options)
            if statistic is not None:
                told["statistics"] = [_statistic(self, statistic, pack) for pack in packs]
            return [compose(merged, packs, packs[0].shapes, **told)]

        def compose_all(self: Strategy, task: int | None) -> Sequence[SkillPack]:
            if len(self.held) < 2:
                return self.held
            kept = self.shared.get(CHOSEN)
            best = {n: original(e).item() for n, e in kept.tensors.items()} if kept else {}
            return made(self, self.held, {**self.options, **best})

        def merged(name: str, *packs: SkillPack, **told: Any) -> Tensor:
            more = [told.pop("statistics")] if statistic is not None else []
            deltas = [pack.delta(name) for pack in packs]
            made = function(deltas, *more, **told)
            if not isinstance(made, Tensor) or made.shape != deltas[0].shape:
                shape = list(made.shape) if isinstance(made, Tensor) else type(made).__name__
                raise AuthorMistake(
                    f"{plugins.line_of(function, function.__name__)}: {function.__name__} makes {shape} of deltas "
                    f"{list(deltas[0].shape)}; return one tensor of their shape."
                )
            return made

        merged.__module__, merged.__qualname__ = function.__module__, function.__qualname__
        merges = {"unlearn": unlearn, "compose": compose_all, "keeps": "merged", "budgeted": False}
        return _strategy(function, learn, **merges)

    return make if function is None else make(function)


def _statistic(strategy: Strategy, statistic: Statistic, pack: SkillPack) -> Any:
    """The number of a pack's delta, computed once."""
    known = strategy.__dict__.setdefault("statistics", {})
    if pack.digest not in known:
        known[pack.digest] = statistic(Deltas(pack), **_wanted(statistic, strategy.options))
    return known[pack.digest]


def _wanted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Options that a function takes, of those given: all of them where it has `**options`."""
    wanted = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in wanted.values()):
        return dict(options)
    return {name: value for name, value in options.items() if name in wanted}


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
