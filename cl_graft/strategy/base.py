"""What a method is: one abstract base, driven like any Avalanche strategy.

A strategy's whole state is its SkillPacks: one a task, in order, and those that its tasks share. What answers for a
task is composed of them (`compose`); `keeps` says how, and also where the next task's training starts:

- `per_task`: every task is tuned from the base; its own pack answers for it.
- `sum`: tuned from the model so far; all packs so far are active, for every task.
- `latest`: tuned from the model so far; the newest pack, a delta to the base, has replaced the others.
- `merged`: every task is tuned from the base; one delta merged from all packs so far answers for all.

Where a task of the stream is to be forgotten, its pack is taken off and is kept no longer; a method without a pack that
is the task's own says how it unlearns (`unlearn`), or is refused.

Where a method has several forms, `keeps` is {value of its option `convention`: one of these}.

The base model is never changed: training works on its weights and they are put back bit for bit.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, ClassVar, Literal

import torch

from cl_graft import plugins
from cl_graft.budget import Budget
from cl_graft.errors import AuthorMistake, CLGraftError, Diverged, UnknownName
from cl_graft.evaluation.examiner import Answered, Examiner, Group
from cl_graft.evaluation.features import Features
from cl_graft.evaluation.outcomes import Outcomes
from cl_graft.evaluation.scorers import Scored
from cl_graft.models import spread
from cl_graft.models.roles import ROLES, Role, untouched
from cl_graft.routing.base import BaseRouter, Choice
from cl_graft.skillpack.folders.loaded import as_loaded
from cl_graft.skillpack.format.file import SkillPack
from cl_graft.skillpack.live.grafted import Grafted
from cl_graft.store.digests import digest
from cl_graft.strategy import route
from cl_graft.strategy.context import Context
from cl_graft.strategy.hooks import Hooks
from cl_graft.strategy.kept import ROUTER, Keeps, Kept, Tensors
from cl_graft.strategy.storage import alive, require_one_weight, spoken_for
from cl_graft.stream import Clock, SupervisedPlugin, check_plugins
from cl_graft.task import Pair, Preference, Scenario, Task
from cl_graft.training.config import Row, StageConfig, at_step, jobs
from cl_graft.training.delta import Delta
from cl_graft.training.stages import Log, Stages, holding, in_full_precision
from cl_graft.training.term import Kind, Term, followed
from cl_graft.version import __version__


class Strategy(Hooks):
    """A continual-learning method, driven like any Avalanche strategy: `train(experience)`, `eval(stream)`.

    A method says what it keeps in `learn`; its options are the keyword-only arguments of that function.
    terms: kinds of terms that it adds to training, so that a launch which cannot carry them is refused before anything
    starts. touches: roles of the parameters that it may change; the others are frozen while it tunes, whatever trains
    it, and it may keep nothing of them. budgeted: False for references that are allowed any size. start: what a task's
    training starts from, the base or the model so far, where that is not what `keeps` says. stages, outcomes: where
    what was trained and measured is kept; without them, as long as the strategy lives. router: infers the task of a
    prompt, which is else given.
    """

    PLUGIN_CLASS = SupervisedPlugin
    keeps: Keeps | Mapping[str, Keeps] = "per_task"
    budgeted: ClassVar[bool] = True
    touches: ClassVar[Collection[Role]] = ROLES
    terms: ClassVar[tuple[Kind, ...]] = ()
    start: ClassVar[Literal["base", "model"] | None] = None
    function: ClassVar[Callable[..., Any]]  # whose keyword-only arguments are the options
    learning_rate_scale = 1.0  # times those of the recipes

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "learn" in cls.__dict__ and "function" not in cls.__dict__:
            cls.function = cls.learn
        if not {*cls.touches} or {*cls.touches} - {*ROLES}:
            raise CLGraftError(
                f"{cls.__name__} touches {', '.join(map(str, cls.touches)) or 'nothing'}; name some of the roles "
                f"{', '.join(ROLES)}."
            )

    @classmethod
    def keeps_by(cls, options: Mapping[str, Any]) -> Keeps:
        """How packs are kept under these options; `per_task` is the form that is told the task, or infers it.

        options: all of them, with their defaults. Raises UnknownName for a convention that the method does not have.
        """
        if isinstance(cls.keeps, str):
            return cls.keeps
        if "convention" not in options:
            raise AuthorMistake(
                f"{plugins.line_of(cls, cls.__name__)}: {cls.__name__} keeps by convention and has none; give it an "
                f"option `convention`, such as {min(cls.keeps)!r}."
            )
        convention = options["convention"]
        if convention not in cls.keeps:
            raise UnknownName(f"convention of {cls.__name__}", str(convention), cls.keeps)
        return cls.keeps[convention]

    @classmethod
    def start_by(cls, keeps: Any) -> Literal["base", "model"]:
        """What a task's training starts from, of a form that keeps its packs as `keeps`, one of Keeps."""
        return cls.start or ("model" if keeps in ("sum", "latest") else "base")

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
        router: BaseRouter | None = None,
    ):
        check_plugins(plugins)
        self.keeps = self.keeps_by(options)
        super().__init__(model=model, device=spread.device_of(model), plugins=list(plugins))
        self.tokenizer, self.scenario, self.budget = tokenizer, scenario, budget
        self.seed, self.options, self.allow_code = seed, dict(options), allow_code
        self.base = as_loaded(model)
        self.grafted = Grafted(model, self.base)
        self.packs: list[SkillPack] = []
        self.shared: dict[str, SkillPack] = {}
        self.router = router if self.keeps == "per_task" else None
        self.stages = stages or Stages(Path(self._own_folder.name))
        self.examiner = Examiner(
            self.grafted, tokenizer, outcomes or Outcomes(Path(self._own_folder.name)), allow_code
        )
        self.answered: dict[str, Answered] = {}
        self.features = Features(model, tokenizer)
        self.thresholds: dict[str, Any] = {}  # of the router's scores, once it was asked
        self.progress: Callable[..., None] = lambda what, done, at="": None
        self._seconds: dict[str, float] = {"train": 0.0, "compress": 0.0}
        self.log = Log()
        self.notes: list[
            str
        ] = []  # what was left out of training, a sentence each, without its full stop
        self.sampling = 0.0  # seconds of sampling preference pairs
        self.results: dict[str, dict[str, list[Scored]]] = {}
        self.clock = Clock()
        self._training_wall = 0.0

    @cached_property
    def _own_folder(self) -> TemporaryDirectory[str]:
        return TemporaryDirectory(prefix="cl-graft-", ignore_cleanup_errors=True)

    def check(self, context: Context, **options: Any) -> None:
        """Refuse options that the model or the budget cannot hold; asked before anything is computed.

        context: of a task, with a model of which shapes alone are known: parameters may be on the meta device.
        Raises CLGraftError or OverBudget with the nearest value that is possible.
        """

    def require_possible(self) -> None:
        """Refuse what no task could be kept under. Raises CLGraftError or OverBudget."""
        longest = max(self.scenario.tasks, key=lambda task: len(task.name))  # its header is, too
        context = self.context(longest)
        if self.budgeted:
            require_one_weight(context)
            if self.router is not None:
                route.require_fit(context, self.router)
        self.check(context, **self.options)
        kind, forgotten = type(self), [t.unlearns for t in self.scenario.tasks if t.unlearns]
        own = self.keeps in ("per_task", "sum") and kind.compose is Strategy.compose
        if forgotten and not own and kind.unlearn is Strategy.unlearn:
            raise CLGraftError(
                f"{kind.__name__} cannot unlearn task {forgotten[0]!r}: it keeps no pack that holds this task and no "
                "other; take a strategy that keeps one a task, or gradient_ascent or negation."
            )

    @abstractmethod
    def learn(self, task: Task, context: Context, **options: Any) -> Tensors | Kept:
        """Train `self.model` on the task and return what to keep, relative to `context.start`."""

    def unlearn(self, task: Task, context: Context, **options: Any) -> Tensors | Kept:
        """Make the model forget task `task.unlearns`, in the turn of `task`, and return what to keep, as `learn` does.

        A pack that is the forgotten task's own is no longer `held` once this returns; nothing else is done here.
        """
        return {}

    def turn(self, task: Task) -> Callable[..., Tensors | Kept]:
        """What makes the pack of a task's turn in the stream: `learn`, or `unlearn` of an earlier task."""
        return self.unlearn if task.unlearns else self.learn

    def fine_tune(
        self,
        task: Task,
        context: Context,
        terms: Sequence[Term] = (),
        parts: Sequence[Task] = (),
    ) -> Delta:
        """Full fine-tuning in place by the task's recipe; returns tuned minus `context.start`, float32.

        terms: what the method adds to the loss or does to the gradients (training/term.py). parts: as of `teach`.
        """
        return context.delta(self.teach(self.model, task, terms, parts))

    def teach(
        self, model: Any, task: Task, terms: Sequence[Term] = (), parts: Sequence[Task] = ()
    ) -> Path:
        """The task's recipe (SFT, then DPO if it has a preference half) in place, on the model or on PEFT's wrapping
        of it; returns the folder of the last stage.

        parts: the tasks that `task` is the `union` of: where one has no pairs the model's own are sampled, and ranked
        by its rule. Strategies of one sweep that do the very same training share it (training/stages.py).
        """
        if undeclared := {term.kind for term in terms} - {*self.terms}:
            raise AuthorMistake(
                f"{self._author} adds a term of kind {min(undeclared)!r} that it does not "
                f"declare; write terms = ({min(undeclared)!r},) in its class."
            )
        seed, begun = self._stage_seed, perf_counter()

        def progress(done: float, at: str) -> None:
            self.progress(f"training {task.name}", done, at)

        with in_full_precision(model), holding(model, self.untouched(task)):
            for its_rows, job in jobs(task, seed, partial(self._sampled, model, parts or [task])):
                rows = self.training_rows(its_rows, job)
                try:
                    folder, log = self.stages.run(
                        model, self.tokenizer, rows, job, progress, terms, self.origin
                    )
                except Diverged as error:
                    where = f"{job.kind.upper()} of task {task.name!r}"
                    raise Diverged(f"{where}: {error}") from error
                self.log.add(log)
                terms = followed(terms, folder)
                at = at_step(job.steps, job.steps, log.losses[-1]["loss"] if log.losses else None)
                self.progress(f"trained {task.name}", 1.0, at)
        self._training_wall += perf_counter() - begun
        torch.manual_seed(seed)  # whether training was recalled must not matter from here
        return folder

    def _sampled(self, model: Any, tasks: Sequence[Task], half: Preference) -> Sequence[Pair]:
        """The tasks' preference pairs; the model's own for a task that has none."""
        begun, pairs = perf_counter(), list[Pair]()
        for task in tasks:
            if task.pairs:
                pairs += task.pairs
                continue
            sampled = self.stages.pairs(
                model, self.tokenizer, task, half, self._stage_seed, self.allow_code
            )
            pairs += sampled.pairs
            if note := sampled.note(task):
                self.notes.append(note)
                self.progress(note, 0.0)
        self.sampling += perf_counter() - begun
        return pairs

    def training_rows(self, rows: Sequence[Row], job: StageConfig) -> Sequence[Row]:
        """The rows that a stage trains on, given those of its task; a method may put others among them.

        The steps stay those of `job`, which says of what kind the rows are.
        """
        return rows

    def foreseen(self) -> Mapping[str, Tensors]:
        """Artefacts as the `learn` of a task will share them, asked for after its last stage, which `cl-graft plan`
        leaves out: what follows from the data, and of what training decides only the shapes (`codecs.exact.unknown`).
        """
        return {}

    @classmethod
    def trains_by_recipe(cls) -> bool:
        """Whether the method trains by the tasks' recipes and nothing else, and sees the outcome as a delta."""
        pure = getattr(cls.learn, "pure", False)
        return pure and (cls.teach, cls.fine_tune) == (Strategy.teach, Strategy.fine_tune)

    @cached_property
    def origin(self) -> str:
        """What tells this method's training from others' that start alike: the digest of its file and options.

        Empty for the short forms, whose function sees the delta only when training is over, and for a `learn` that is
        marked `pure`. Any other may do what it likes to the model before it trains, so such a method shares its
        training with itself alone.
        """
        kind = type(self)
        if kind.trains_by_recipe():
            return ""
        file = Path(inspect.getfile(kind))
        return digest(plugins.sources_of(file), kind.__qualname__, self.options)

    def untouched(self, task: Task) -> frozenset[str]:
        """Names of the parameters that stay as they are while the task is learned: those of roles that the method
        declares not to touch, and embeddings and head where the task's recipe freezes them.

        Raises CLGraftError where that leaves the method nothing to train.
        """
        touched = {*self.touches}
        if task.training.freeze_embeddings:
            touched -= {"embedding", "head"}
        if not touched:
            raise CLGraftError(
                f"the recipe of task {task.name!r} freezes the embeddings, and {type(self).__name__} touches nothing "
                "else; give the recipe freeze_embeddings=false."
            )
        return untouched(self.model, touched) if touched < {*ROLES} else frozenset()

    @property
    def _stage_seed(self) -> int:
        return self.seed + 1000 * len(self.packs)

    # --- which packs answer ---

    def compose(self, task: int | None) -> Sequence[SkillPack]:
        """The packs whose deltas are added to the base for task number `task` (0-based); None is no known task.

        A method whose tasks share artefacts makes its own here, with `cl_graft.skillpack.live.composed.compose`.
        """
        if self.keeps == "per_task":
            if task is None or task >= len(self.packs) or task in self.unlearned:
                return []
            return [self.packs[task]]
        return self.packs[-1:] if self.keeps == "latest" else self.held

    @property
    def unlearned(self) -> frozenset[int]:
        """Numbers of the tasks (0-based) without a pack any more: those unlearned so far, and those that did it."""
        if self.keeps == "latest":
            return frozenset()
        turns = self.scenario.tasks[: len(self.packs)]
        gone = {task.unlearns for task in turns if task.unlearns}
        return frozenset(n for n, task in enumerate(turns) if task.unlearns or task.name in gone)

    @property
    def held(self) -> list[SkillPack]:
        """The packs of all tasks so far that were not unlearned."""
        return [pack for number, pack in enumerate(self.packs) if number not in self.unlearned]

    def before_learning(self) -> Sequence[SkillPack]:
        """The packs active when the next task's training starts."""
        return self.compose(None) if self.start_by(self.keeps) == "model" else []

    def route(self, prompts: Sequence[str], task: int | None) -> list[Choice]:
        """What answers each prompt: the task that is given, or what the router infers; before the first, the base."""
        if self.router is None or not self.packs:
            known = task is not None and task < len(self.packs)
            return [Choice.of(task if known else None)] * len(prompts)
        return route.choices(self, self.router, prompts)

    def groups(self, task: Task, number: int | None) -> list[Group]:
        """Who answers which of the task's test examples: packs, and the examples' indices, together all of them."""
        chosen: dict[Choice, list[int]] = {}
        for index, choice in enumerate(self.route([e.prompt for e in task.test], number)):
            chosen.setdefault(choice, []).append(index)
        return [route.group(self, choice, rows) for choice, rows in chosen.items()]

    def _learn_to_route(self, task: Task) -> None:
        """Update the router's state by the task's training prompts; nothing of earlier tasks is looked at."""
        if self.router is None:
            return
        begun = perf_counter()
        if tensors := route.learned(self, self.router, task):
            self.shared[ROUTER] = self._pack(task, tensors, type(self.router).__name__)
        self._seconds["compress"] += perf_counter() - begun

    # --- learning a task ---

    @property
    def _author(self) -> str:
        """The method's line and name, for what is its author's to mend."""
        return f"{plugins.line_of(type(self), type(self).__name__)}: {type(self).__name__}"

    def _pack(self, task: Task, tensors: Tensors, method: str = "") -> SkillPack:
        in_order = dict(sorted(tensors.items()))  # as a file gives them back: sums go by it
        return SkillPack(
            tensors=in_order,
            task=task.name,
            method=method or type(self).__name__,
            options=self.options,
            base=self.grafted.base,
            versions={"cl_graft": __version__, "torch": torch.__version__},
        )

    def context(self, task: Task) -> Context:
        """What a method may look at; the model holds the weights that the task's training starts from."""
        self.grafted.activate(self.before_learning())
        start = self.base
        if self.grafted.active and self.keeps != "latest":
            start = spread.copies(self.model)
        return Context(
            model=self.model,
            tokenizer=self.tokenizer,
            task=task,
            start=spread.near(start, self.model),
            budget=replace(
                self.budget,
                less=spoken_for(self.held, self.shared, self.keeps == "latest", self.budget),
            ),
            seed=self.seed,
            header=self._pack(task, {}),
            frozen=self.untouched(task),
            progress=lambda done: self.progress(f"compressing {task.name}", done),
        )

    @property
    def alive(self) -> list[SkillPack]:
        """All that the method keeps: the packs that it still needs, and what its tasks share."""
        return alive(self.held, self.shared, self.keeps == "latest")

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of training (also where it was recalled), compressing and evaluating so far.

        Of a `learn` that runs no stage all is training up to the last step of an optimizer, or, where none of torch's
        steps, all of it.
        """
        return self._seconds | {"evaluate": self.examiner.seconds}

    @property
    def unmeasured_seconds(self) -> float:
        """Seconds of sampling preference pairs, and of waiting for another cell's evaluation."""
        return self.sampling + self.examiner.waiting_seconds

    def restore_base(self) -> None:
        """Put the base's weights back into the model, bit for bit; no pack is active."""
        spread.write(self.model, self.base.__getitem__)
        self.grafted.unload()
