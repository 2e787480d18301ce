"""How a method is driven: Avalanche's hooks, in which an experience is learned and kept, or measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import torch

from cl_graft.evaluation.examiner import Answered, key
from cl_graft.evaluation.scorers import Scored
from cl_graft.models.spread import unwritten
from cl_graft.skillpack.memory import release
from cl_graft.strategy.kept import as_kept, finite_only, require_name, require_touched, watched
from cl_graft.strategy.storage import require_fit
from cl_graft.stream import BaseTemplate, drawn
from cl_graft.task import Task
from cl_graft.training.adapters import faster
from cl_graft.training.own_loop import counted
from cl_graft.training.stages import Log


class Hooks(BaseTemplate):
    """The hooks of a Strategy (strategy/base.py) that Avalanche calls; everything that they use is declared there."""

    def _before_training_exp(self, **kwargs: Any) -> None:
        """Plug-ins find the experience's examples, and may leave a loader of others in their place."""
        task = self.scenario.tasks[self.experience.current_experience]
        self.adapted_dataset, self.dataloader = self.experience.dataset, None
        self.train_mb_size = task.training.batch
        super()._before_training_exp(**kwargs)

    def _train_exp(self, experience: Any, eval_streams: Any = None, **kwargs: Any) -> None:
        task = self.scenario.tasks[experience.current_experience]
        if self.dataloader is not None:
            torch.manual_seed(self._stage_seed)
            task = replace(task, train=drawn(self.dataloader))
        task = self.at_rate(task)
        self._learn_to_route(task)
        context = self.context(task)
        begun, trained, self._training_wall = perf_counter(), self.log.seconds, 0.0
        torch.manual_seed(self.seed + len(self.packs))
        whose = f"{type(self).__name__} in task {task.name!r}"
        with counted() as steps, watched(self.model, whose), unwritten(self.model, whose):
            learned = self.turn(task)(task, context, **self.options)
        # no stage: up to its last step, the method trained in a loop of its own
        if not self._training_wall:
            self._training_wall = (steps.last or perf_counter()) - begun
            self.log.add(Log(seconds=self._training_wall, spent=self._training_wall))
        kept = finite_only(as_kept(learned, self._author), whose)
        self.restore_base()
        require_touched(kept.own, context, type(self).__name__)
        if self.budgeted:
            context.require_fit(kept.own)
        self.packs.append(self._pack(task, kept.own))
        for name, tensors in kept.shared.items():
            require_name(name, self._author)
            self.shared[name] = self._pack(task, tensors)
        if self.budgeted:
            require_fit(self.held, self.shared, self.keeps == "latest", self.budget)
        release()
        self._seconds["train"] += self.log.seconds - trained
        self._seconds["compress"] += perf_counter() - begun - self._training_wall
        self.clock.train_iterations += task.training.steps

    def at_rate(self, task: Task) -> Task:
        """The task with its recipe at the learning rates that this strategy was tuned to."""
        scale = self.learning_rate_scale
        return task if scale == 1 else faster(task, scale)

    def _eval_exp(self, **kwargs: Any) -> None:
        number = self.experience.current_experience
        task = self.scenario.tasks[number]
        self.results[task.name] = self.measure(task, number)
        self._show_to_avalanche(self.results[task.name][task.metrics[0]])

    def measure(self, task: Task, number: int | None) -> dict[str, list[Scored]]:
        """Outcomes of every metric of the task, one a test example, with what answers for each of them.

        number: of the task (0-based), for methods that are told; None where there is none, as of general ability.
        """
        groups = self.groups(task, number)
        names = self.scenario.task_names if self.keeps == "per_task" else ()
        self.answered[task.name] = Answered(key(task, groups)[1:], groups, names)
        # general ability is measured with each task's packs on, too (experiment/general.py)
        outcomes = self.examiner.measure(task, groups, len(self.packs), every=number is None)
        # within an evaluation the next task may be answered by the same weights
        if not self.current_eval_stream:
            self.grafted.unload()
        return outcomes

    def _show_to_avalanche(self, outcomes: Sequence[Scored]) -> None:
        """Show each example as a two-class problem, 'answered right or not', to Avalanche's own metrics."""
        right = torch.tensor([o.score >= 0.5 for o in outcomes]).long()
        self.mb_y = torch.ones_like(right)
        self.mb_output = torch.nn.functional.one_hot(right, 2).float()
        self.mb_task_id = torch.zeros_like(right)
        for plugin in self.plugins:
            for callback in ("before_eval_iteration", "after_eval_iteration"):
                if hasattr(plugin, callback):
                    getattr(plugin, callback)(self)

    def _after_eval(self, **kwargs: Any) -> None:
        self.grafted.unload()
        super()._after_eval(**kwargs)
