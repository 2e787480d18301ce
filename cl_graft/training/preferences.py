"""Preference pairs from the model itself: sample, rank by the task's rule, keep best against worst."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from cl_graft.evaluation.generate import answers
from cl_graft.evaluation.scorers import Examinee, score
from cl_graft.models.pairs import different
from cl_graft.task import Example, Pair, Preference, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampled:
    """A model's own pairs. cut_off: answers that came to no end within the task's max_new_tokens: none is in a pair."""

    pairs: list[Pair]
    cut_off: int

    def note(self, task: Task) -> str:
        """What was left out, or ""."""
        if not self.cut_off:
            return ""
        return (
            f"task {task.name!r}: {self.cut_off} sampled answers were cut at max_new_tokens={task.max_new_tokens} and "
            f"are in no preference pair; {len(self.pairs)} pairs are left"
        )


def sampled(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    preference: Preference,
    seed: int,
    allow_code: bool,
) -> Sampled:
    """Pairs of a right answer and a wrong one, at most one a prompt, the first of each as sampled.

    An answer that was cut at `max_new_tokens` is in none: training would put an end where there was none. Prompts on
    which all other samples score alike teach nothing and are left out, as are pairs that are alike within the recipe's
    max_length; where no prompt is left the list is empty. Where the answer is one of `choices`, the worse one is
    another choice at random.
    """
    rng = Random(seed)
    chosen = rng.sample(list(task.train), min(preference.prompts, len(task.train)))
    longest = task.training.max_length
    if chosen[0].choices:
        wrong = [rng.choice([c for c in e.choices if c != e.completion]) for e in chosen]
        pairs = [Pair(e.prompt, e.completion, w) for e, w in zip(chosen, wrong, strict=True)]
        return Sampled(different(tokenizer, pairs, longest), 0)
    repeated = [example for example in chosen for _ in range(preference.samples)]
    said = answers(
        model,
        tokenizer,
        [example.prompt for example in repeated],
        task.max_new_tokens,
        preference.temperature,
        seed,
    )
    texts = [answer.text for answer in said]
    scores = _scores(model, tokenizer, task, repeated, texts, allow_code)
    pairs = []
    for start in range(0, len(repeated), preference.samples):
        window = range(start, start + preference.samples)
        whole = [i for i in window if said[i].finished and texts[i]]
        if not whole:
            continue
        best, worst = max(whole, key=lambda i: scores[i]), min(whole, key=lambda i: scores[i])
        if scores[best] > scores[worst]:
            pairs.append(Pair(repeated[start].prompt, texts[best], texts[worst]))
    cut_off = sum(not answer.finished for answer in said)
    return Sampled(different(tokenizer, pairs, longest), cut_off)


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
