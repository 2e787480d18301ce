"""What a scenario is made of: examples, tasks, and how each task is trained. Plain data, light to import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from random import Random
from typing import Annotated, Any

from pydantic import Field

from cl_graft.errors import CLGraftError
from cl_graft.ranges import Count, NotNegative, Positive, Share, require_fields

SHARE, LEAST, MOST = 20, 4, 64  # of validation: one prompt in 20, from 4 to 64 prompts


@dataclass(frozen=True)
class Example:
    """One prompt with its reference answer.

    tests, setup: `assert` statements for answers that are programs, and what runs before them (in the sandbox).
    choices: the label set, for answers chosen by likelihood.
    suite: the benchmark that a test example belongs to. A task tested on several is scored by the mean of
    their means, and each has a matrix of its own, too.
    row: which row of the folder of the task's `logits` it is, 0-based.
    """

    prompt: str
    completion: str
    tests: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    setup: str = ""
    suite: str = ""
    row: int | None = None


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse answer."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Preference:
    """The DPO half of a training recipe, on the task's own pairs or else on the model's best and worst answers.

    prompts, samples: how many training prompts, and how many sampled answers for each, where a task has no pairs.
    epochs: passes over the pairs, instead of `steps`.
    beta, length_normalised: the loss (Rafailov et al. 2023; length normalisation as in TRL's `sigmoid_norm`).
    """

    prompts: Count = 192
    samples: Annotated[int, Field(ge=2)] = 8
    temperature: Positive = 1.0
    steps: Count = 60
    batch: Count = 16
    learning_rate: Positive = 1e-4
    beta: Positive = 0.1
    length_normalised: bool = False
    epochs: Positive | None = None

    def __post_init__(self) -> None:
        require_fields(self, "preference")


@dataclass(frozen=True)
class Training:
    """How a task trains: `steps` of `batch` examples, linear warm-up, cosine decay, AdamW; then DPO if `preference`.

    batch: examples of one optimizer step over all processes together. epochs: passes over the examples, instead of
    `steps`. freeze_embeddings: train neither embeddings nor head, whatever the method would touch.
    """

    steps: Count = 250
    batch: Count = 32
    learning_rate: Positive = 1e-3
    warmup: Share = 0.1
    weight_decay: NotNegative = 0.0
    max_length: Count = 512
    preference: Preference | None = None
    epochs: Positive | None = None
    freeze_embeddings: bool = False

    def __post_init__(self) -> None:
        require_fields(self, "training")


@dataclass(frozen=True)
class Scoring:
    """A scorer with options: by name, by path, or `HOST:NAME` for one that a scenario's file defines.

    A scorer that comes in several conventions is called `NAME:CONVENTION`, as `number:lm-eval` is.

    label: what tables and records call it; its name with the options that were given, if not said otherwise.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        if not self.label:
            host, _, inner = self.name.rpartition(":")
            inner = inner if host.endswith(".py") else self.name
            short = Path(inner).stem if inner.endswith(".py") else inner
            told = ", ".join(f"{k}={v}" for k, v in sorted(self.options.items()))
            object.__setattr__(self, "label", f"{short}({told})" if told else short)

    @classmethod
    def of(cls, said: str | Scoring) -> Scoring:
        return said if isinstance(said, cls) else cls(str(said))


@dataclass(frozen=True)
class Logits:
    """What other models say of a task's training rows: the folder of the files, and a digest of all they hold."""

    folder: Path
    digest: str


@dataclass(frozen=True)
class Task:
    """What is learned and how it is scored.

    score: the primary scorer, by name or as a Scoring; `also`: further ones, each with a matrix of its own.
    pairs: preference data made beforehand; without any, a recipe with a preference half samples from the model.
    validation: what methods choose their factors on, never trained on; `with_validation` says what there is without.
    notes: sentences on its data, such as how many rows were left out and why; `cl-graft validate` tells them.
    unlearns: name of an earlier task of the stream that is to be forgotten in this one's turn; `train` is then what
    must go, with its prompts and answers.
    logits: what methods that distil are taught by, where the training rows have it (`transfer build --logits`).
    """

    name: str
    train: Sequence[Example]
    test: Sequence[Example]
    score: str | Scoring
    also: tuple[str | Scoring, ...] = ()
    max_new_tokens: Count = 48
    training: Training = field(default_factory=Training)
    pairs: Sequence[Pair] = ()
    validation: Sequence[Example] = ()
    notes: tuple[str, ...] = ()
    unlearns: str = ""
    logits: Logits | None = None

    def __post_init__(self) -> None:
        _require_made(f"task {self.name!r}: its training", self.training, Training)
        for part, kind in (
            ("train", Example),
            ("test", Example),
            ("validation", Example),
            ("pairs", Pair),
        ):
            rows = getattr(self, part)
            if not hasattr(rows, "__len__"):
                raise CLGraftError(
                    f"task {self.name!r}: {part} is of type {type(rows).__name__}; give a list."
                )
            for number, row in enumerate(rows):
                if not isinstance(row, kind):
                    _require_made(f"task {self.name!r}: {part}[{number}]", row, kind)
        require_fields(self, f"task {self.name!r}: task")
        named = set(self.suites)
        if "" in named and len(named) > 1:
            raise CLGraftError(
                f"task {self.name!r} has test examples with a suite and others without; name a suite for all of them."
            )
        if len(set(self.metrics)) < len(self.metrics):
            raise CLGraftError(
                f"task {self.name!r} has two scorers of one name in {', '.join(self.metrics)}; give a Scoring a label."
            )
        if clash := named & {"score", *self.metrics[1:]}:
            raise CLGraftError(
                f"task {self.name!r} has a suite named {min(clash)!r}, as one of its scorers is; rename the suite."
            )

    @property
    def scorings(self) -> tuple[Scoring, ...]:
        return tuple(map(Scoring.of, (self.score, *self.also)))

    @property
    def metrics(self) -> tuple[str, ...]:
        """The labels of its scorers, the primary one first."""
        return tuple(scoring.label for scoring in self.scorings)

    @property
    def suites(self) -> tuple[str, ...]:
        """The suite of every test example."""
        return tuple(example.suite for example in self.test)

    def with_validation(self) -> Task:
        """The task with validation examples whose prompts it does not train on, in `train` or `pairs`.

        Where it has none of its own, one in 20 different prompts of its training set, at least 4 and at most 64, are
        drawn by the task's name, the same for every seed and strategy, and all rows with them set aside; of fewer than
        20 prompts none are. Raises CLGraftError where its own validation leaves nothing to train on.
        """
        held = self.validation or self._drawn()
        prompts = {example.prompt for example in held}
        train = [example for example in self.train if example.prompt not in prompts]
        if self.train and not train:
            raise CLGraftError(
                f"every training prompt of task {self.name!r} is one of its validation; give it others."
            )
        if len(train) == len(self.train) and not prompts & {pair.prompt for pair in self.pairs}:
            return self if held is self.validation else replace(self, validation=held)
        pairs = tuple(pair for pair in self.pairs if pair.prompt not in prompts)
        return replace(self, train=tuple(train), pairs=pairs, validation=held)

    def _drawn(self) -> tuple[Example, ...]:
        """The training examples of the prompts that are set aside."""
        prompts = list(dict.fromkeys(example.prompt for example in self.train))
        if len(prompts) < SHARE:
            return ()
        count = min(max(len(prompts) // SHARE, LEAST), MOST)
        held = set(Random(f"validation/{self.name}").sample(prompts, count))
        return tuple(example for example in self.train if example.prompt in held)


@dataclass(frozen=True)
class Scenario:
    """Tasks in the order they are learned, each with validation (Task.with_validation), and what is only measured.

    chat: prompts are a user's turn and are put into the chat template of the model's tokenizer; None: where it has one.
    """

    name: str
    tasks: tuple[Task, ...]
    general: Task | None = None
    chat: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks))
        for number, task in enumerate(self.tasks):
            _require_made(f"scenario {self.name!r}: tasks[{number}]", task, Task)
        if self.general is not None:
            _require_made(f"scenario {self.name!r}: general", self.general, Task)
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise CLGraftError(
                f"scenario {self.name!r} needs at least one task and different names, not {names}."
            )
        for number, task in enumerate(self.tasks):
            if task.unlearns and task.unlearns not in [
                t.name for t in self.tasks[:number] if not t.unlearns
            ]:
                raise CLGraftError(
                    f"scenario {self.name!r}: task {task.name!r} unlearns {task.unlearns!r}, which no task before it "
                    "teaches; name one that does."
                )
        object.__setattr__(self, "tasks", tuple(task.with_validation() for task in self.tasks))

    @property
    def task_names(self) -> tuple[str, ...]:
        return tuple(task.name for task in self.tasks)

    @property
    def examined(self) -> tuple[Task, ...]:
        """All that is scored: the tasks, then general ability where it is measured."""
        return self.tasks + ((self.general,) if self.general else ())

    def with_training(self, **changes) -> Scenario:
        """A copy of the scenario with fields of every task's `Training` changed."""
        tasks = [replace(task, training=replace(task.training, **changes)) for task in self.tasks]
        return replace(self, tasks=tuple(tasks))


def _require_made(what: str, given: Any, kind: type) -> None:
    """Raises CLGraftError for what is not of the class that it has to be of."""
    if not isinstance(given, kind):
        first = ", ".join(f.name for f in fields(kind) if f.default is MISSING)
        raise CLGraftError(
            f"{what} is of type {type(given).__name__}; make it a cl_graft.task.{kind.__name__}({first})."
        )
