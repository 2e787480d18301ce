"""What a scorer is, how a function becomes one, and scoring the same examples by several of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from cl_graft import plugins
from cl_graft.errors import CLGraftError
from cl_graft.evaluation.sandbox import require_consent
from cl_graft.task import Example, Scenario, Scoring, Task

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cl_graft.evaluation.engine import Served

Needs = Literal["answers", "likelihoods", "model", "base"]
# tokens that are read, and those whose likelihood is asked
Row = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Scored:
    """One example's outcome: the score, and the answer it was given for."""

    score: float
    answer: str
    note: str = ""


@dataclass
class Examinee:
    """A model under test. Answers are generated once and shared by every scorer of the same examples, likelihoods, too.

    base_answers: the base's, where the model is not the base itself and a scorer needs them. folder: of what scorers
    were told by others than the model, kept for other cells. known: log-likelihoods by the tokens read and those asked.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    max_length: int
    allow_code: bool = False
    given: Sequence[str] | None = None  # answers that exist already
    served: Served | None = None  # who answers in the model's place
    base_answers: Sequence[str] | None = None
    folder: Path | None = None
    known: dict[Row, float] = field(default_factory=dict)

    def answers(self, examples: Sequence[Example]) -> Sequence[str]:
        from cl_graft.evaluation.generate import generate

        if self.given is not None:
            return self.given
        prompts = [e.prompt for e in examples]
        if self.served:
            return self.served.answers(prompts, self.max_new_tokens)
        return generate(self.model, self.tokenizer, prompts, self.max_new_tokens)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        from cl_graft.evaluation.generate import log_likelihoods
        from cl_graft.models.text import encode_all

        given = ((prompt, (answer,)) for prompt, answer in pairs)
        encoded = encode_all(self.tokenizer, given, self.max_length)
        rows = [(tuple(head), tuple(tail)) for head, (tail,) in encoded]
        new = {row: pair for row, pair in zip(rows, pairs, strict=True) if row not in self.known}
        asked = list(new.values())
        if self.served:
            found = self.served.likelihoods(asked, self.max_length)
        else:
            found = log_likelihoods(self.model, self.tokenizer, asked, self.max_length)
        self.known.update(zip(new, found, strict=True))
        return [self.known[row] for row in rows]

    def choice_likelihoods(
        self, prompts: Sequence[str], choices: Sequence[str]
    ) -> list[list[float]]:
        from cl_graft.evaluation.generate import choice_likelihoods, choice_rows

        given = prompts, choices, self.max_length
        if self.served:
            found = self.served.choice_likelihoods(*given)
        else:
            found = choice_likelihoods(self.model, self.tokenizer, *given)
        heads, tails = choice_rows(self.tokenizer, *given)
        each = [tuple(tail) for tail in tails]
        for head, values in zip(map(tuple, heads), found, strict=True):
            self.known.update({(head, tail): x for tail, x in zip(each, values, strict=True)})
        return found


@dataclass(frozen=True)
class Scorer:
    """A function that scores, higher when better, with what has to be known of it before it runs.

    needs: what it is given. "answers": `function(example, answer, *, options)` returns one score; with `together` it
    is given the sequences of all examples and answers, and returns as many scores. "likelihoods" or "model":
    `function(examinee, examples, *, options)` returns a score an example; it asks only for likelihoods, or else uses
    the model as it likes, and no answer is generated for it. "base": the same, and it asks for the model's answers and
    compares them with the base's. A score is a number or a Scored.
    consent: it runs code that a model wrote, so the user has to allow it. reads: the fields of an example that it
    cannot do without. flaw: why an example cannot be scored, in a few words, or "". sampled: the scorer that judges
    an answer in words in its place. identity: plain data besides its files on which its scores depend, or a function
    that tells it of the options, and raises CLGraftError where they do not go together. convention: what figures by it
    are to be compared with, in a few words; `{option}` in it stands for an option's value.
    """

    function: Callable[..., Any]
    needs: Needs = "answers"
    together: bool = False
    consent: bool = False
    reads: tuple[str, ...] = ("completion",)
    flaw: Callable[[Example], str] = lambda example: ""
    sampled: str | None = None
    identity: Mapping[str, Any] | Callable[[Mapping[str, Any]], Mapping[str, Any]] = field(
        default_factory=dict
    )
    convention: str = ""

    def __post_init__(self) -> None:
        for name in ("__name__", "__doc__", "__module__"):
            object.__setattr__(self, name, getattr(self.function, name))

    @property
    def name(self) -> str:
        return self.function.__name__

    def score(
        self, examinee: Examinee, examples: Sequence[Example], **options: Any
    ) -> list[Scored]:
        """One outcome an example. Raises ConsentNeeded, or CLGraftError for scores that are none."""
        if self.consent:
            require_consent(examinee.allow_code, f"the scorer {self.name!r}")
        answers: Sequence[str] = [""] * len(examples)
        if self.needs == "base":
            answers = examinee.answers(examples)
        if self.needs != "answers":
            values = self.function(examinee, examples, **options)
        else:
            answers = examinee.answers(examples)
            if self.together:
                values = self.function(examples, answers, **options)
            else:
                pairs = zip(examples, answers, strict=True)
                values = [self.function(*pair, **options) for pair in pairs]
        return self._checked(list(values), answers)

    def _checked(self, values: Sequence[Any], answers: Sequence[str]) -> list[Scored]:
        if len(values) != len(answers):
            raise CLGraftError(
                f"the scorer {self.name!r} gives {len(values)} scores for {len(answers)} examples; return one for each."
            )
        scored = []
        for value, answer in zip(values, answers, strict=True):
            number = value.score if isinstance(value, Scored) else value
            if not isinstance(number, Real) or not math.isfinite(number):
                raise CLGraftError(
                    f"the scorer {self.name!r} gives {number!r} for the answer {answer[:60]!r}; return a finite "
                    "number."
                )
            scored.append(value if isinstance(value, Scored) else Scored(float(number), answer))
        return scored


def scorer(**declared: Any) -> Callable[[Callable[..., Any]], Scorer]:
    """Make the function below it a scorer of that name; what can be declared are the fields of `Scorer`."""
    return lambda function: Scorer(function, **declared)


def _found(scoring: Scoring) -> tuple[Scorer, dict[str, Any]]:
    """The scorer and its options, defaults included. Raises UnknownName or CLGraftError."""
    scorer = plugins.load("scorer", scoring.name)
    return scorer, plugins.check_options("scorer", scorer.name, scorer, scoring.options)


def score(
    examinee: Examinee, examples: Sequence[Example], metrics: Sequence[str | Scoring]
) -> dict[str, list[Scored]]:
    """{label: outcomes} of every scorer on the same examples.

    Raises UnknownName, ConsentNeeded where code may not be run, or CLGraftError for scores that are none.
    """
    scorings = [Scoring.of(metric) for metric in metrics]
    scorers = {scoring.label: _found(scoring) for scoring in scorings}
    if any(scorer.needs in ("answers", "base") for scorer, _ in scorers.values()):
        examinee = replace(examinee, given=examinee.answers(examples))
    return {
        label: scorer.score(examinee, examples, **options)
        for label, (scorer, options) in scorers.items()
    }


def conventions(scenario: Scenario) -> dict[str, dict[str, str]]:
    """{task: {label: what figures by the scorer are to be compared with}}, a task's primary scorer first."""
    return {
        task.name: {s.label: described(s)["convention"] for s in task.scorings}
        for task in scenario.examined
    }


def described(scoring: Scoring) -> dict[str, Any]:
    """All that scores depend on besides examples and model, as plain data: options, declared identity, source files."""
    scorer, options = _found(scoring)
    return {
        "scorer": scorer.name,
        "convention": scorer.convention.format_map(options),
        "options": options,
        "identity": dict(
            scorer.identity(options) if callable(scorer.identity) else scorer.identity
        ),
        "sources": plugins.sources("scorer", scoring.name),
    }


def resolved(
    scenario: Scenario, host: str, options: Mapping[str, Mapping[str, Any]]
) -> tuple[Scenario, set[str]]:
    """The scenario with every scorer found and its options checked; and the names of the scorers that it uses.

    host: the scenario's name or path; a scorer that its file defines comes before all others of that name, and paths
    are also looked up from its folder. options: {scorer: {option: value}}, over those that the scenario sets.
    Raises UnknownName, or CLGraftError, also for a test example that one of its task's scorers cannot score.
    """
    used: set[str] = set()

    def checked(scoring: Scoring) -> str | Scoring:
        named = replace(scoring, name=plugins.within("scorer", scoring.name, host))
        short = _found(named)[0].name
        used.add(short)
        chosen = replace(named, options={**scoring.options, **options.get(short, {})})
        described(chosen)
        return chosen.name if chosen == Scoring.of(chosen.name) else chosen

    def scored(task: Task) -> Task:
        first, *further = map(checked, task.scorings)
        made = replace(task, score=first, also=tuple(further))
        _refuse_flawed(made)
        return made

    general = scenario.general and scored(scenario.general)
    tasks = tuple(map(scored, scenario.tasks))
    return replace(scenario, tasks=tasks, general=general), used


def _refuse_flawed(task: Task) -> None:
    for scorer, _ in map(_found, task.scorings):
        for row, example in enumerate(task.test):
            if flaw := scorer.flaw(example):
                raise CLGraftError(
                    f"test example {row} (from 0) of task {task.name!r} cannot be scored by {scorer.name!r}: it has "
                    f"{flaw}; mend or leave out that row, or choose another scorer."
                )


def can_score(scoring: Scoring, examples: Iterable[Example]) -> bool:
    """Whether the scorer has what it needs of every example."""
    scorer, _ = _found(scoring)
    return all(
        all(getattr(example, field) for field in scorer.reads) and not scorer.flaw(example)
        for example in examples
    )


def require_consents(allowed: bool, tasks: Iterable[Task]) -> None:
    """Raise ConsentNeeded for the first task that a scorer which needs consent scores, unless it is given."""
    for task in tasks:
        if any(_found(scoring)[0].consent for scoring in task.scorings):
            require_consent(allowed, f"scoring task {task.name!r}")


def asked_of_model(task: Task) -> tuple[list[Scoring], bool]:
    """The scorings that ask the model for more than answers and run no code, and whether any asks for answers."""
    found = [(scoring, _found(scoring)[0]) for scoring in task.scorings]
    more = [s for s, k in found if k.needs in ("likelihoods", "model") and not k.consent]
    return more, any(k.needs in ("answers", "base") for _, k in found)


def compared(task: Task) -> str | None:
    """The label of the task's first scorer that compares answers with the base's; None where none does."""
    found = (s.label for s in task.scorings if _found(s)[0].needs == "base")
    return next(found, None)


def needs_of(scenario: Scenario) -> list[tuple[str, Needs]]:
    """Name and `needs` of each scorer of its tasks, once each."""
    scorers = [_found(s)[0] for task in scenario.examined for s in task.scorings]
    return list(dict.fromkeys((scorer.name, scorer.needs) for scorer in scorers))


def judges_of(scenario: Scenario) -> list[str]:
    """Addresses of the servers that judge answers of its tasks, once each."""
    told = [
        described(s)["identity"].get("judge") for task in scenario.examined for s in task.scorings
    ]
    return list(dict.fromkeys(w["url"] for w in told if isinstance(w, Mapping) and "url" in w))


def judge_of(scoring: Scoring) -> Scoring | None:
    """The scoring that judges an answer in words: itself, or the one named in its place; None where there is none."""
    scorer, _ = _found(scoring)
    if scorer.needs == "answers":
        return scoring
    return Scoring(scorer.sampled) if scorer.sampled else None
