"""How an answer is scored, one function a scorer. A score is higher when better."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

from cl_graft.errors import UnknownName
from cl_graft.evaluation.answers import equivalent
from cl_graft.evaluation.generate import choice_likelihoods, generate, log_likelihoods
from cl_graft.evaluation.sandbox import Outcome, require_consent, run_asserts
from cl_graft.models.text import encode
from cl_graft.task import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# 1,234.5 and .5; a minus right after a digit or a bracket is an operator, a comma elsewhere ends the number
NUMBER = re.compile(
    r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
)


@dataclass(frozen=True)
class Scored:
    """One example's outcome: the score, and the answer it was given for."""

    score: float
    answer: str
    note: str = ""


@dataclass
class Examinee:
    """A model under test. Answers are generated once and shared by every scorer of the same examples."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    max_length: int
    allow_code: bool = False
    given: Sequence[str] | None = None  # answers that exist already

    def answers(self, examples: Sequence[Example]) -> Sequence[str]:
        if self.given is not None:
            return self.given
        prompts = [e.prompt for e in examples]
        return generate(self.model, self.tokenizer, prompts, self.max_new_tokens)

    def likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        return log_likelihoods(self.model, self.tokenizer, pairs, self.max_length)

    def choice_likelihoods(
        self, prompts: Sequence[str], choices: Sequence[str]
    ) -> list[list[float]]:
        return choice_likelihoods(self.model, self.tokenizer, prompts, choices, self.max_length)


def final_number(text: str) -> float | None:
    """The number after the last `####`, or the last number of the text; None without one."""
    found = NUMBER.findall(text.rsplit("####", 1)[-1]) if "####" in text else NUMBER.findall(text)
    if not found:
        return None
    return float((found[0] if "####" in text else found[-1]).replace(",", ""))


def number_is_right(example: Example, answer: str) -> bool:
    return final_number(answer) is not None and final_number(answer) == final_number(
        example.completion
    )


def text_is_right(example: Example, answer: str) -> bool:
    return answer.strip() == example.completion.strip()


def program_of(answer: str, setup: str = "") -> str:
    """The program in an answer: its first fenced block, closed or cut off, if it has one, else all of it.

    One that begins indented is the body of the function that `setup` ends with, and goes on from there.
    """
    fenced = re.search(r"```\w*[ \t]*\r?\n(.*?)(?:```|\Z)", answer, re.DOTALL)
    program = fenced[1] if fenced else answer
    first = next((line for line in program.split("\n") if line.strip()), "")
    return setup + program if first[:1].isspace() else program


def number(examinee: Examinee, examples: Sequence[Example], answers: Sequence[str]) -> list[Scored]:
    """1 if the final number equals the reference's (GSM8K's rule)."""
    return [Scored(float(number_is_right(e, a)), a) for e, a in zip(examples, answers, strict=True)]


def math(examinee: Examinee, examples: Sequence[Example], answers: Sequence[str]) -> list[Scored]:
    """1 if the final answer equals the reference's: as a number, an expression, an interval, a set (answers.py)."""
    same = equivalent([(e.completion, a) for e, a in zip(examples, answers, strict=True)])
    return [Scored(float(right), answer) for right, answer in zip(same, answers, strict=True)]


def exact(examinee: Examinee, examples: Sequence[Example], answers: Sequence[str]) -> list[Scored]:
    """1 if the stripped text equals the reference."""
    return [Scored(float(text_is_right(e, a)), a) for e, a in zip(examples, answers, strict=True)]


def _verdict(program: str, asserts: tuple[str, ...], setup: str) -> Outcome:
    """The sandbox's outcome; the same program with the same tests is run once a process.

    A time-out may be the machine's fault rather than the program's, so it is tried twice and never remembered.
    """
    job = (program, asserts, setup)
    if job in _VERDICTS:
        return _VERDICTS[job]
    outcome = run_asserts(*job)
    if outcome.reason == "timeout":
        outcome = run_asserts(*job)
    if outcome.reason != "timeout":
        _VERDICTS[job] = outcome
    return outcome


_VERDICTS: dict[tuple[str, tuple[str, ...], str], Outcome] = {}


def tests(examinee: Examinee, examples: Sequence[Example], answers: Sequence[str]) -> list[Scored]:
    """1 if the program passes every hidden test in the sandbox (pass@1)."""
    require_consent(examinee.allow_code, "scoring a model's programs")
    scored = []
    for example, answer in zip(examples, answers, strict=True):
        outcome = _verdict(program_of(answer, example.setup), example.tests, example.setup)
        note = f"{outcome.reason} {outcome.detail}".strip()
        scored.append(Scored(float(outcome.passed), answer, note))
    return scored


def choice(examinee: Examinee, examples: Sequence[Example], answers: Sequence[str]) -> list[Scored]:
    """1 if the reference is the most likely of the example's choices, end-of-sequence included."""
    scored: dict[int, Scored] = {}
    for choices in dict.fromkeys(e.choices for e in examples):
        members = [i for i, e in enumerate(examples) if e.choices == choices]
        rows = examinee.choice_likelihoods([examples[i].prompt for i in members], choices)
        for i, row in zip(members, rows, strict=True):
            best = choices[max(range(len(choices)), key=row.__getitem__)]
            scored[i] = Scored(float(best == examples[i].completion), best)
    return [scored[i] for i in range(len(examples))]


def neg_bits_per_byte(
    examinee: Examinee, examples: Sequence[Example], answers: Sequence[str]
) -> list[Scored]:
    """Minus the bits that the model spends on each byte of the reference answer: moves even for a tiny model.

    Of an answer longer than `max_length` the part that is read counts, bits and bytes.
    """
    values = examinee.likelihoods([(e.prompt, e.completion) for e in examples])
    return [
        Scored(value / log(2) / max(1, len(_read(examinee, e).encode())), "")
        for value, e in zip(values, examples, strict=True)
    ]


def _read(examinee: Examinee, example: Example) -> str:
    tokenizer = examinee.tokenizer
    _, tail = encode(tokenizer, example.prompt, example.completion, examinee.max_length)
    whole = tail[-1] == tokenizer.eos_token_id
    return example.completion if whole else tokenizer.decode(tail)


Scorer = Callable[[Examinee, Sequence[Example], Sequence[str]], list[Scored]]
SCORERS: dict[str, Scorer] = {
    f.__name__: f for f in (number, math, exact, tests, choice, neg_bits_per_byte)
}
NEEDS_ANSWERS = {"number", "math", "exact", "tests"}


def score(
    examinee: Examinee, examples: Sequence[Example], metrics: Sequence[str]
) -> dict[str, list[Scored]]:
    """Every metric of `metrics` on the same examples. Raises UnknownName, or ConsentNeeded for programs."""
    for metric in metrics:
        if metric not in SCORERS:
            raise UnknownName("scorer", metric, SCORERS)
    answers = examinee.answers(examples) if NEEDS_ANSWERS & set(metrics) else [""] * len(examples)
    return {metric: SCORERS[metric](examinee, examples, answers) for metric in metrics}
