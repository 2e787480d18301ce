"""1 if the final answer is equivalent to the reference's, as a number, expression, interval or set, by math-verify."""

from collections.abc import Sequence

from cl_graft.evaluation import _math_child, answers, final_answer, math_forms
from cl_graft.evaluation.scorers.base import scorer
from cl_graft.store.digests import code_digest
from cl_graft.task import Example


@scorer(
    together=True,
    convention='the last box, else the line after #### or "answer is"; equal by math-verify 0.9, words as written',
    identity={"code": code_digest(answers, final_answer, math_forms, _math_child)},
)
def math(examples: Sequence[Example], given: Sequence[str]) -> list[bool]:
    """Reads the last `\\boxed{...}`, the line after a mark or after "answer is", or else the last formula or number."""
    pairs = [(e.completion, a) for e, a in zip(examples, given, strict=True)]
    return answers.equivalent(pairs)
