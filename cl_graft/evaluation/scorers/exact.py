"""1 if the stripped text equals the reference."""

from cl_graft.evaluation.scorers.base import scorer
from cl_graft.task import Example


@scorer(convention="the whole text, capital and small letters told apart")
def exact(example: Example, answer: str) -> bool:
    """Capital and small letters differ."""
    return answer.strip() == example.completion.strip()
