"""The test examples behind a cell's scores: what was asked, what was answered, and when that was right."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cl_graft.report.statistics import Strata
from cl_graft.store.prompts import Asked

RIGHT = 0.5  # a score from here on counts as right
OUTCOMES = {
    "kept": "wrong before, right once learned, right at the end",
    "forgotten": "right once learned, wrong at the end",
    "late": "wrong once learned, right at the end",
    "never": "wrong once learned and at the end",
    "known": "right before, once learned and at the end",
}


class Answer(NamedTuple):
    """A test example's answer at one experience. note: what the scorer said of it. taken_for: the task that it was
    answered as, "" for the base model; None where that made no difference."""

    score: float
    text: str
    note: str
    taken_for: str | None = None


class ExampleRow(NamedTuple):
    """A test example with its answers before any learning, once its task was learned, and at the end."""

    number: int
    asked: Asked | None
    before: Answer
    learned: Answer | None
    end: Answer | None

    @property
    def outcome(self) -> str:
        """One of OUTCOMES, or nothing where its task is yet to be learned."""
        if self.learned is None or self.end is None:
            return ""
        before, learned, end = (a.score >= RIGHT for a in (self.before, self.learned, self.end))
        if learned:
            return "forgotten" if not end else "known" if before else "kept"
        return "late" if end else "never"


def breakdown(
    path: Path, cell: Mapping[str, Any], asked: Mapping[str, Sequence[Asked]]
) -> dict[str, list[ExampleRow]]:
    """{task: its test examples, by its primary metric}. The end of an incomplete cell is its last whole experience.

    A task whose examples are not all on disk is left out.
    """
    last = latest(cell)
    if last < 0:
        return {}
    tasks = list(cell["tasks"])
    base, end = (_answers(path, experience, tasks) for experience in (0, last))
    by_task = {}
    for j, task in enumerate(tasks):
        before = base.get(task, [])
        nothing: list[Any] = [None] * len(before)
        learned = ends = nothing
        if j + 1 <= last:
            ends = end.get(task, [])
            learned = ends if j + 1 == last else _answers(path, j + 1, [task]).get(task, [])
        parts = [list(asked.get(task) or nothing), before, learned, ends]
        if before and {len(part) for part in parts} == {len(before)}:
            by_task[task] = [ExampleRow(i, *row) for i, row in enumerate(zip(*parts, strict=True))]
    return by_task


def outcomes(
    path: Path, cell: Mapping[str, Any], asked: Mapping[str, Sequence[Asked]], row: int
) -> dict[str, Strata]:
    """{task: its scores in a row of the cell's matrix}, the weights of a task's suites summing to 1.

    Empty where they do not come to the scores that the cell recorded: the suites of a task are told by `asked` alone.
    """
    tasks, by_task = list(cell["tasks"]), dict[str, Strata]()
    answers = _answers(path, row, tasks)
    for task, recorded in zip(tasks, cell["matrix"][row], strict=True):
        scores = np.array([a.score for a in answers.get(task, ())])
        suites = [a.suite for a in asked.get(task, ())] or [""] * len(scores)
        if not len(scores) or len(suites) != len(scores):
            return {}
        names = list(dict.fromkeys(suites))
        parts = [scores[[s == name for s in suites]] for name in names]
        mean = sum(float(x.mean()) for x in parts) / len(parts)
        if recorded is None or not math.isclose(mean, recorded, abs_tol=1e-9):
            return {}
        by_task[task] = [(1 / len(parts), x) for x in parts]
    return by_task


def latest(cell: Mapping[str, Any]) -> int:
    """Number of the last experience that is whole; -1 where not even the base model's is."""
    return len(cell["tasks"]) if cell["complete"] else len(cell["general"]) - 1


def _answers(path: Path, experience: int, tasks: Sequence[str]) -> dict[str, list[Answer]]:
    """{task: its answers in order, by its primary metric}, which is the first that its lines name.

    Only lines of these tasks are parsed: they start as `record.write_experience` starts them. Where there is no file,
    or one of a task's lines is torn, there are no answers.
    """
    file = path / "experiences" / f"{experience:02d}" / "examples.jsonl"
    if not file.is_file():
        return {}
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    by_task = {}
    for task in tasks:
        start = f'{{"task": {json.dumps(task)},'
        # at once: a report reads hundreds of thousands of lines
        try:
            read = json.loads(f"[{','.join(line for line in lines if line.startswith(start))}]")
            primary = read[0]["metric"] if read else None
            answers = [
                Answer(float(one["score"]), one["answer"], one["note"], _taken_for(one))
                for one in read
                if one["metric"] == primary
            ]
        except (ValueError, KeyError, TypeError):
            continue
        if answers:
            by_task[task] = answers
    return by_task


def _taken_for(line: Mapping[str, Any]) -> str | None:
    return (line["taken_for"] or "") if "taken_for" in line else None
