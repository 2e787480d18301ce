"""1 if the reference is the most likely of the example's choices, end-of-sequence included."""

from collections.abc import Sequence

from cl_graft.evaluation.scorers.base import Examinee, Scored, scorer
from cl_graft.task import Example


@scorer(
    needs="likelihoods",
    reads=("choices", "completion"),
    sampled="exact",
    convention="the likeliest choice by summed log-likelihood, end-of-sequence included",
)
def choice(examinee: Examinee, examples: Sequence[Example]) -> list[Scored]:
    """Each prompt is read once, whatever the number of its choices."""
    scored: dict[int, Scored] = {}
    for choices in dict.fromkeys(e.choices for e in examples):
        members = [i for i, e in enumerate(examples) if e.choices == choices]
        rows = examinee.choice_likelihoods([examples[i].prompt for i in members], choices)
        for i, row in zip(members, rows, strict=True):
            best = choices[max(range(len(choices)), key=row.__getitem__)]
            scored[i] = Scored(float(best == examples[i].completion), best)
    return [scored[i] for i in range(len(examples))]
