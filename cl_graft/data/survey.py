"""What a scenario's data hold that a reader of its scores should know: sizes, frequent answers, repeats and leaks."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from cl_graft.task import Scenario, Task


@dataclass(frozen=True)
class Facts:
    """One task's data. Prompts are compared without regard to blanks, line ends, and capital and small letters.

    train, validation, test: examples; train counts preference pairs where there is nothing else. answers: different
    reference answers of the test. common, share: the most frequent of them, and its share of the test, which is what
    always giving it scores where an answer is right or wrong. repeated: training rows whose prompt was there before.
    leaked, elsewhere: test prompts that this task, or another one, trains on other than to forget them.
    """

    task: str
    train: int
    validation: int
    test: int
    answers: int
    common: str
    share: float
    repeated: int
    leaked: int
    elsewhere: int
    notes: tuple[str, ...]


def survey(scenario: Scenario) -> list[Facts]:
    """Facts of each task, in their order, and of what is only measured."""
    trained = {task.name: [folded(prompt) for prompt in _prompts(task)] for task in scenario.tasks}
    by_prompt: dict[str, set[str]] = {}
    for task in scenario.tasks:
        for prompt in trained[task.name] if not task.unlearns else ():
            by_prompt.setdefault(prompt, set()).add(task.name)
    return [_facts(task, trained.get(task.name, []), by_prompt) for task in scenario.examined]


def folded(prompt: str) -> str:
    return " ".join(prompt.casefold().split())


def _prompts(task: Task) -> list[str]:
    return [row.prompt for row in (task.train or task.pairs)]


def most_frequent(answers: Counter[str]) -> tuple[str, int]:
    """The answer that is there most often, the first by name of several, and how often."""
    return min(answers.items(), key=lambda a: (-a[1], a[0]), default=("", 0))


def _facts(task: Task, trained: list[str], by_prompt: dict[str, set[str]]) -> Facts:
    answers = Counter(example.completion.strip() for example in task.test)
    common, count = most_frequent(answers)
    of = [by_prompt.get(folded(example.prompt), set()) for example in task.test]
    return Facts(
        task.name,
        len(trained),
        len(task.validation),
        len(task.test),
        len(answers),
        common,
        count / len(task.test) if task.test else math.nan,
        len(trained) - len({*trained}),
        sum(task.name in names for names in of),
        sum(bool(names - {task.name}) for names in of),
        task.notes,
    )
