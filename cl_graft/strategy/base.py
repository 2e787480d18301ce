"""What a method is: the one abstract base, and the two short forms most methods are written in.

A strategy's whole state is its SkillPacks: one a task, in order. Which of them answer for a task is said
by `keeps`, and that also says where the next task's training starts:

- `per_task`: every task is tuned from the base; its own pack answers for it.
- `sum`: tuned from the model so far; all packs so far are active, for every task.
- `latest`: tuned from the model so far; the newest pack, a delta to the base, has replaced the others.
- `merged`: every task is tuned from the base; one delta merged from all packs so far answers for all.

The base model is never changed: training works on its weights and they are put back bit for bit.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, ClassVar, Literal

import torch

from cl_graft import __version__
from cl_graft.budget import Budget
from cl_graft.evaluation.outcomes import Outcomes
from cl_graft.evaluation.scorers import Examinee, Scored, score
from cl_graft.skillpack.codecs import Encoded
from cl_graft.skillpack.format.file import SkillPack, fingerprint
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.store.locks import locked
from cl_graft.strategy.context import Context
from cl_graft.stream import BaseTemplate, Clock, SupervisedPlugin
from cl_graft.task import Scenario, Task
from cl_graft.training.config import dpo_job, sft_job
from cl_graft.training.delta import Delta
from cl_graft.training.stages import Log, Stages, in_full_precision

Keeps = Literal["per_task", "sum", "latest", "merged"]


class Strategy(BaseTemplate):
    """A continual-learning method, driven like any Avalanche strategy: `train(experience)`, `eval(stream)`.

    A method says what it keeps in `learn`; its options are the keyword-only arguments of that function.
    budgeted: False for references that are allowed any size. stages, outcomes: where what was trained and measured is
    kept; without them, as long as the strategy lives.
    """

    PLUGIN_CLASS = SupervisedPlugin
    keeps: ClassVar[Keeps] = "per_task"
    budgeted: ClassVar[bool] = True
    function: ClassVar[Callable[..., Any]]  # whose keyword-only arguments are the options

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "learn" in cls.__dict__ and "function" not in cls.__dict__:
            cls.function = cls.learn

    def __init__(
        self,
        *,
        model: Any,
        tokenizer: Any,
        scenario: Scenario,
        budget: Budget,
        seed: int,
        options: Mapping[str, Any],
        allow_code: bool = False,
        plugins: Sequence[Any] = (),
        stages: Stages | None = None,
        outcomes: Outcomes | None = None,
    ):
        super().__init__(model=model, device=model.device, plugins=list(plugins))
        self.tokenizer, self.scenario, self.budget = tokenizer, scenario, budget
        self.seed, self.options, self.allow_code = seed, dict(options), allow_code
        self.base = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.grafted = Grafted(model)
        self.packs: list[SkillPack] = []
        self.stages = stages or Stages(Path(self._own_folder.name))
        self.outcomes = outcomes or Outcomes(Path(self._own_folder.name))
        self.progress: Callable[[str, float], None] = lambda what, done: None
        self.seconds: dict[str, float] = {"train": 0.0, "compress": 0.0, "evaluate": 0.0}
        self.log = Log()
        self.aside = 0.0  # seconds of sampling preference pairs, and of waiting for another cell's evaluation
        self.measured: dict[tuple[str, ...], dict[str, list[Scored]]] = {}
        self.recalled: set[tuple[str, ...]] = (
            set()
        )  # what another cell or stage measured, same weights
        self.results: dict[str, dict[str, list[Scored]]] = {}
        self.clock = Clock()
        self._training_wall = 0.0

    @cached_property
    def _own_folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="cl-graft-", ignore_cleanup_errors=True)

    @abstractmethod
    def learn(self, task: Task, context: Context, **options: Any) -> dict[str, Encoded]:
        """Train `self.model` on the task and return what to keep, relative to `context.start`."""

    def fine_tune(self, task: Task, context: Context) -> Delta:
        """Full fine-tuning in place by the task's recipe; returns tuned minus `context.start`, float32.

        Strategies of one sweep that do the very same training share it (training/stages.py).
        """
        delta = Delta(self.teach(self.model, task), context.start, self.model.device)
        torch.manual_seed(
            self._stage_seed
        )  # whether training was recalled must not matter from here
        return delta

    def teach(self, model: Any, task: Task) -> Path:
        """The task's recipe (SFT, then DPO if it has a preference half) in place, on the model or on PEFT's wrapping
        of it; returns the folder of the last stage."""
        half, seed = task.training.preference, self._stage_seed

        def progress(done: float) -> None:
            self.progress(f"training {task.name}", done)

        def run(rows: Any, job: Any) -> Path:
            folder, log = self.stages.run(model, self.tokenizer, rows, job, progress)
            self.log.add(log)
            return folder

        begun = perf_counter()
        with in_full_precision(model):
            folder = run(*sft_job(task, seed))
            if half:
                sampled = perf_counter()
                pairs = task.pairs or self.stages.pairs(
                    model, self.tokenizer, task, half, seed, self.allow_code
                )
                self.aside += perf_counter() - sampled
                if pairs:
                    folder = run(*dpo_job(task, pairs, seed))
        self._training_wall += perf_counter() - begun
        return folder

    @property
    def _stage_seed(self) -> int:
        return self.seed + 1000 * len(self.packs)

    # --- which packs answer ---

    def active(self, task: int | None) -> list[SkillPack]:
        """The packs that answer for task number `task` (0-based), or for an input of no known task."""
        if self.keeps == "per_task":
            return [self.packs[task]] if task is not None and task < len(self.packs) else []
        return self.packs[-1:] if self.keeps == "latest" else list(self.packs)

    def before_learning(self) -> list[SkillPack]:
        """The packs active when the next task's training starts."""
        return list(self.active(None)) if self.keeps in ("sum", "latest") else []

    def context(self, task: Task) -> Context:
        """What a method may look at; the model holds the weights that the task's training starts from."""
        header = SkillPack(
            tensors={},
            task=task.name,
            method=type(self).__name__,
            options=self.options,
            base=self.grafted.base,
            versions={"cl_graft": __version__, "torch": torch.__version__},
        )
        self.grafted.activate(self.before_learning())
        start = self.base
        if self.grafted.active:
            start = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        return Context(
            model=self.model,
            tokenizer=self.tokenizer,
            task=task,
            start=self.base if self.keeps == "latest" else start,
            budget=self.budget,
            seed=self.seed,
            header=header,
            progress=lambda done: self.progress(f"compressing {task.name}", done),
        )

    # --- Avalanche's hooks ---

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        task = self.scenario.tasks[experience.current_experience]
        context = self.context(task)
        begun, trained, self._training_wall = perf_counter(), self.log.seconds, 0.0
        torch.manual_seed(self.seed + len(self.packs))
        tensors = self.learn(task, context, **self.options)
        self._restore_base()
        if self.budgeted:
            context.require_fit(tensors)
        self.packs.append(replace(context.header, tensors=tensors))
        self.seconds["train"] += self.log.seconds - trained
        self.seconds["compress"] += perf_counter() - begun - self._training_wall
        self.clock.train_iterations += task.training.steps

    def _eval_exp(self, **kwargs: Any) -> None:
        number = self.experience.current_experience
        task = self.scenario.tasks[number]
        outcomes = self.measure(task, self.active(number))
        self.results[task.name] = outcomes
        self._show_to_avalanche(outcomes[task.metrics[0]])

    def _show_to_avalanche(self, outcomes: Sequence[Scored]) -> None:
        """Each example as a two-class problem, 'answered right or not', for Avalanche's own metrics."""
        right = torch.tensor([o.score >= 0.5 for o in outcomes]).long()
        self.mb_y = torch.ones_like(right)
        self.mb_output = torch.nn.functional.one_hot(right, 2).float()
        self.mb_task_id = torch.zeros_like(right)
        for plugin in self.plugins:
            for callback in ("before_eval_iteration", "after_eval_iteration"):
                if hasattr(plugin, callback):
                    getattr(plugin, callback)(self)

    # --- measuring ---

    def measure(self, task: Task, packs: Sequence[SkillPack]) -> dict[str, list[Scored]]:
        """Outcomes of every metric of the task with exactly `packs` active; the same weights are measured once."""
        key = (task.name, *(pack.digest for pack in packs))
        if key not in self.measured:
            self.grafted.activate(packs)
            weights, stage = fingerprint(self.model.named_parameters()), len(self.packs)
            file = self.outcomes.file(weights, self.tokenizer, task)
            begun = perf_counter()
            with locked(file):
                self.aside += perf_counter() - begun
                known = self.outcomes.recall(file, stage)
                if known is None:
                    known = self._score(task), False
                    self.outcomes.keep(file, task, known[0], weights, stage)
            self.grafted.unload()
            self.measured[key], elsewhere = known
            if elsewhere:
                self.recalled.add(key)
        return self.measured[key]

    def _score(self, task: Task) -> dict[str, list[Scored]]:
        begun = perf_counter()
        examinee = Examinee(
            self.model,
            self.tokenizer,
            task.max_new_tokens,
            task.training.max_length,
            self.allow_code,
        )
        found = score(examinee, task.test, task.scorings)
        self.seconds["evaluate"] += perf_counter() - begun
        return found

    def _restore_base(self) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(self.base[name])
        self.grafted.unload()
