"""Preference pairs from the model itself: sample, rank by the task's rule, keep best against worst."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING

from cl_graft.evaluation.generate import generate
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.task import Example, Pair, Preference, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def preference_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    preference: Preference,
    seed: int,
    allow_code: bool,
) -> list[Pair]:
    """Pairs of a right answer and a wrong one, at most one a prompt, the first of each as sampled.

    Prompts on which all samples score alike teach nothing and are left out; where no prompt is left
    the list is empty. Where the answer is one of `choices`, the worse one is another choice at random.
    """
    rng = Random(seed)
    chosen = rng.sample(list(task.train), min(preference.prompts, len(task.train)))
    if chosen[0].choices:
        wrong = [rng.choice([c for c in e.choices if c != e.completion]) for e in chosen]
        return [Pair(e.prompt, e.completion, w) for e, w in zip(chosen, wrong, strict=True)]
    repeated = [example for example in chosen for _ in range(preference.samples)]
    answers = generate(
        model,
        tokenizer,
        [example.prompt for example in repeated],
        task.max_new_tokens,
        preference.temperature,
        seed,
    )
    scores = _scores(model, tokenizer, task, repeated, answers, allow_code)
    pairs = []
    for start in range(0, len(repeated), preference.samples):
        window = range(start, start + preference.samples)
        best, worst = max(window, key=lambda i: scores[i]), min(window, key=lambda i: scores[i])
        if scores[best] > scores[worst] and answers[best] and answers[worst]:
            pairs.append(Pair(repeated[start].prompt, answers[best], answers[worst]))
    return pairs


def _scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    examples: Sequence[Example],
    answers: Sequence[str],
    allow_code: bool,
) -> list[float]:
    examinee = Examinee(model, tokenizer, task.max_new_tokens, 512, allow_code, given=answers)
    (outcomes,) = score(examinee, examples, task.scorings[:1]).values()
    return [s.score for s in outcomes]
