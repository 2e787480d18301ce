"""What a sweep will measure, counted as its strategies learn in a dry run, and how long it takes, by a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.evaluation import divergence
from cl_graft.evaluation.batches import BATCH
from cl_graft.evaluation.examiner import Group
from cl_graft.evaluation.scorers import Examinee, asked_of_model, score
from cl_graft.store.digests import digest
from cl_graft.task import Task

if TYPE_CHECKING:
    from cl_graft.strategy.base import Strategy

Kind = Literal["scores", "kl"]
WARM = 2  # examples that are not timed: the first ones pay for what is set up once


@dataclass
class PlannedEvaluation:
    """A task's test examples, read by one set of weights.

    kind: `scores`, or `kl`, the divergence from the base. by: the task after which it is measured, None for the base.
    state: `cached` or `to run`; what weights that are not there yet will answer counts as to run. seconds: None where
    nothing was probed. cells: names of those that ask for it.
    """

    task: str
    kind: Kind
    by: str | None
    examples: int
    state: str
    seconds: float | None
    cells: list[str]


class Evaluations:
    """The measurements of one cell, asked for while its strategy learns in a dry run: `base`, then `learned` a task."""

    def __init__(self, config: RunConfig, strategy: Strategy, exact: bool, clock: Clock):
        self.config, self.strategy, self.exact, self.clock = config, strategy, exact, clock
        self.found: list[tuple[str, PlannedEvaluation]] = []
        self.known: set[str] = set()

    def base(self) -> None:
        """All tasks by the base, which every cell of the same base shares; what is timed is timed on its weights."""
        strategy, scenario = self.strategy, self.strategy.scenario
        engine = strategy.examiner.engine.told if strategy.examiner.engine else None
        for task in scenario.examined:
            file = strategy.examiner.outcomes.file(
                strategy.grafted.base, strategy.tokenizer, task, engine
            )
            key = f"base {self.config.model} {file.name}"
            self._enter(key, task, "scores", None, self.exact and file.is_file())
            if task is not scenario.general and divergence.sample(task):
                self.clock(self.config, strategy, task, "kl", self.exact)

    def learned(self) -> None:
        """All that is measured once the newest pack is there: what answers now and was not measured before.

        Where tasks are inferred, as if the router were right, and took prompts of tasks to come for the newest.
        """
        strategy, number = self.strategy, len(self.strategy.packs) - 1
        newest = strategy.scenario.tasks[number]
        for task, who in self._asked(number):
            self._enter(self._key(task, who), task, "scores", newest.name, False)
        if divergence.sample(newest) and self._names(newest, number):
            key = f"{self.config.cell} kl {newest.name}"
            self._enter(key, newest, "kl", newest.name, False)

    def _asked(self, number: int) -> Iterator[tuple[Task, int | None]]:
        """Each task with the number of that whose packs answer it; the general one by every task's own."""
        strategy = self.strategy
        for n, task in enumerate(strategy.scenario.tasks):
            yield task, min(n, number) if strategy.router else n
        if (general := strategy.scenario.general) is not None:
            own: Sequence[int | None] = range(number + 1)
            for each in own if strategy.keeps == "per_task" else [None]:
                yield general, each

    def _key(self, task: Task, number: int | None) -> str:
        """What tells a measurement from others; empty where the base answers, which is measured already."""
        names = self._names(task, number)
        return f"{self.config.cell} {task.name} {digest(names)}" if names else ""

    def _names(self, task: Task, number: int | None) -> list[str]:
        """What tells apart who answers, none for the base; in place of packs that cannot be composed yet, how many."""
        strategy = self.strategy
        if number is not None and number >= len(strategy.packs) and strategy.keeps == "per_task":
            return []
        try:
            return Group(strategy.compose(number), range(len(task.test)), number).names
        except CLGraftError:
            raise
        except Exception:  # artefacts of a dry run hold no values
            return [f"{number} of {len(strategy.packs)}"]

    def _enter(self, key: str, task: Task, kind: Kind, by: str | None, cached: bool) -> None:
        if not key or key in self.known:
            return
        self.known.add(key)
        seconds = None if cached else self.clock(self.config, self.strategy, task, kind, self.exact)
        count = len(divergence.sample(task)) if kind == "kl" else len(task.test)
        state = "cached" if cached else "to run"
        self.found.append((key, PlannedEvaluation(task.name, kind, by, count, state, seconds, [])))


class Clock:
    """Seconds of an evaluation, of some of its examples read by the base; None where nothing is probed, where an engine
    or another server answers, and for models whose weights are not loaded.

    Code is not run and nobody is asked to judge: the model's answers and likelihoods are timed.
    """

    def __init__(self, probe: bool):
        self.probe = probe
        self.known: dict[Any, float] = {}

    def __call__(
        self, config: RunConfig, strategy: Strategy, task: Task, kind: Kind, real: bool
    ) -> float | None:
        if not (self.probe and real) or strategy.examiner.engine:
            return None
        owned = config.options.get(config.short(config.scenario), {})
        what = (config.model, config.scenario, digest(owned), task.name, kind)
        if what not in self.known:
            self.known[what] = (_divergence if kind == "kl" else _scores)(strategy, task)
        return self.known[what]


def _scores(strategy: Strategy, task: Task) -> float:
    """Seconds of scoring the task, from as many of its examples as one batch takes, spread over all."""
    examinee = Examinee(
        strategy.model, strategy.tokenizer, task.max_new_tokens, task.training.max_length
    )
    metrics, answers = asked_of_model(task)
    some = task.test[:: max(1, -(-len(task.test) // BATCH))]

    def read(examples: Sequence[Any]) -> None:
        score(replace(examinee, known={}), examples, metrics)
        if answers:
            examinee.answers(examples)

    return _seconds_of_one(read, some) * len(task.test)


def _divergence(strategy: Strategy, task: Task) -> float:
    """Seconds of the divergence of one model from the base, from a quarter of its examples."""
    chosen = divergence.sample(task)
    pairs = [(task.test[i].prompt, task.test[i].completion) for i in chosen][::4]

    def read(some: Sequence[tuple[str, str]]) -> None:
        divergence.per_example(strategy.examiner, some, Group([], ()), task.training.max_length)

    return _seconds_of_one(read, pairs) * len(chosen)


def _seconds_of_one(read: Callable[[Sequence[Any]], None], some: Sequence[Any]) -> float:
    read(some[:WARM])
    begun = perf_counter()
    read(some)
    return (perf_counter() - begun) / max(1, len(some))
