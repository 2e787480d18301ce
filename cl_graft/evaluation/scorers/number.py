"""1 if the final number equals the reference's: GSM8K's rule (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re

from cl_graft.evaluation.scorers.base import scorer
from cl_graft.ranges import NotNegative
from cl_graft.task import Example

# 1,234.5 and .5; a minus right after a digit or a bracket is an operator, a comma elsewhere ends the number
NUMBER = re.compile(
    r"(?:(?<![\w)])-)?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<![\w.])\.\d+)"
)


def final_number(text: str) -> float | None:
    """The number after the last `####`, or the last number of the text; None without one."""
    numbers = NUMBER.findall(text.rsplit("####", 1)[-1]) if "####" in text else NUMBER.findall(text)
    if not numbers:
        return None
    return float((numbers[0] if "####" in text else numbers[-1]).replace(",", ""))


def _flaw(example: Example) -> str:
    lacks = final_number(example.completion) is None
    return f"no number in its completion {example.completion[:40]!r}" if lacks else ""


@scorer(flaw=_flaw)
def number(example: Example, answer: str, *, tolerance: NotNegative = 0.0) -> bool:
    """tolerance: the numbers may differ by so much."""
    given, right = final_number(answer), final_number(example.completion)
    if given is None or right is None:
        return False
    return given == right or abs(given - right) <= tolerance
