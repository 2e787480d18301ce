"""What a trial of `cl-graft tune` sees of a scenario: its first tasks, and no test example of theirs."""

from __future__ import annotations

from dataclasses import replace

from cl_graft.errors import CLGraftError
from cl_graft.evaluation.scorers import can_score
from cl_graft.task import Scenario, Scoring, Task

BITS = "neg_bits_per_byte"  # the scorer that tells equals apart


def rehearsal(scenario: Scenario, first: int) -> Scenario:
    """The first tasks of the stream, each tested on its validation by its primary scorer and by `neg_bits_per_byte`.

    By the second alone, all of them, where a primary scorer cannot score the validation of its task: training data may
    have no tests. Raises CLGraftError for a task without validation.
    """
    tasks = scenario.tasks[:first]
    for task in tasks:
        if not task.validation:
            raise CLGraftError(
                f"task {task.name!r} has no validation examples to tune on; give it some, or 20 different training "
                "prompts."
            )
    whole = all(can_score(Scoring.of(task.score), task.validation) for task in tasks)
    return replace(scenario, tasks=tuple(_tested(task, whole) for task in tasks), general=None)


def _tested(task: Task, whole: bool) -> Task:
    bits = Scoring(BITS)
    score = Scoring.of(task.score) if whole else bits
    also = () if score.name == BITS else (bits,)
    return replace(task, test=task.validation, score=score, also=also)
