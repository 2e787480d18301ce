"""1 if the stripped answer begins with the reference's first character: a letter that is chosen, then why."""

from cl_graft.evaluation.scorers.base import scorer
from cl_graft.task import Example


def _flaw(example: Example) -> str:
    return "" if example.completion.strip() else "an empty reference"


@scorer(convention="the first character that is no blank, as TRACE scores ScienceQA", flaw=_flaw)
def first_character(example: Example, answer: str) -> bool:
    """An empty answer is wrong."""
    return answer.strip()[:1] == example.completion.strip()[0]
