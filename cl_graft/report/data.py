"""The table of what a scenario's data hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

from cl_graft.data.survey import Facts
from cl_graft.report.table import UNMEASURED, Table

NOTE = (
    "Always, %: what the most frequent reference answer of the test scores if it is always given, where an answer is "
    "right or wrong. Repeated: training rows whose prompt was there before. Leaked: test prompts that the task trains "
    "on; of others: that another task does. Prompts are compared without regard to blanks and capital letters."
)
COLUMNS = (
    *("Task", "Train", "Validation", "Test", "Answers", "Most frequent", "Always, %"),
    *("Repeated", "Leaked", "Of others"),
)
LONGEST = 28  # characters of an answer that are shown


def data_table(scenario: str, facts: Sequence[Facts]) -> Table:
    """A row a task: sizes, the most frequent answer and what it scores, repeats and leaks."""
    return Table(f"Data · {scenario}", COLUMNS, tuple(map(_row, facts)), NOTE)


def _row(facts: Facts) -> tuple[str, ...]:
    answer = " ".join(facts.common.split())
    shown = answer if len(answer) <= LONGEST else f"{answer[: LONGEST - 1]}…"
    share = UNMEASURED if math.isnan(facts.share) else f"{100 * facts.share:.1f}"
    sizes = (facts.train, facts.validation, facts.test, facts.answers)
    counts = (facts.repeated, facts.leaked, facts.elsewhere)
    return (facts.task, *(f"{n:,}" for n in sizes), shown, share, *(f"{n:,}" for n in counts))
