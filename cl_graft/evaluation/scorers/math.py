"""1 if the final answer is equivalent to the reference's, as a number, expression, interval or set, by math-verify."""

from collections.abc import Sequence

from cl_graft.evaluation import _math_child, answers
from cl_graft.evaluation.scorers.base import scorer
from cl_graft.store.digests import code_digest
from cl_graft.task import Example


@scorer(together=True, identity={"code": code_digest(answers, _math_child)})
def math(examples: Sequence[Example], given: Sequence[str]) -> list[bool]:
    """Reads the last `\\boxed{...}`, or else the last formula or number."""
    pairs = [(e.completion, a) for e, a in zip(examples, given, strict=True)]
    return answers.equivalent(pairs)
