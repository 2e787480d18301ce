"""Which answers become training data. Pure functions of what was sampled and how it was judged.

An answer that was cut off at the length limit never is what a model should say: it can only be the worse one of
a pair. An empty answer is nothing at all. A rule reads the result and not how it was come by, so that a source that
guesses is right now and then: of right answers that of the source which is right most often at this prompt is taken.
Among equals the choice falls by a digest of seed, source and text, so that no position is favoured and the same data
come out on every machine; the caller puts the prompt into the seed, so that no source is favoured throughout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

# Why a source gave no pair for a prompt.
FEW = "fewer than two different answers"
RIGHT = "all right"
WRONG = "none right"
CUT_OFF = "best cut off"
BELOW = "gap below the minimum"
ABOVE = "gap above the maximum"
BEATEN = "another source's pair is better"


@dataclass(frozen=True)
class Judged:
    """One different answer to a prompt.

    by_rule: the reward is 1 for right and 0 for wrong. share: of its source's answers to this prompt, repeated ones
    counted, those that a rule found right; 0 by a reward model, which says itself how good an answer is.
    """

    source: str
    text: str
    reward: float
    finished: bool = True
    by_rule: bool = True
    share: float = 0.0


@dataclass(frozen=True)
class Chosen:
    """A better and a worse answer of one source."""

    better: Judged
    worse: Judged

    @property
    def gap(self) -> float:
        return self.better.reward - self.worse.reward


def distinct(answers: Sequence[Judged]) -> list[Judged]:
    """Answers without empty ones and without those that their source had given before, in order."""
    kept: dict[tuple[str, str], Judged] = {}
    for answer in answers:
        if answer.text.strip():
            kept.setdefault((answer.source, answer.text), answer)
    return list(kept.values())


def best(answers: Sequence[Judged], seed: int | str) -> Judged | None:
    """What a model should say: the finished answer of the highest reward; by a rule, a right one of the surest."""
    fit = [a for a in answers if a.finished and not (a.by_rule and a.reward < 1)]
    return min(fit, key=lambda a: (-a.reward, -a.share, _draw(seed, a)), default=None)


def pair(
    answers: Sequence[Judged], sources: Sequence[str], gaps: tuple[float, float], seed: int | str
) -> tuple[Chosen | None, dict[str, str]]:
    """The best pair of one source, and {source: why it gave none}.

    Of each source the best and the worst answer, if their gap is positive and, where a reward model gave it, at
    least gaps[0] and at most gaps[1]; of these pairs the one with the best answer, of equals the widest, of such
    that of the source which is right most often.
    """
    pairs: list[Chosen] = []
    dropped: dict[str, str] = {}
    for source in sources:
        of_source = _of_one_source([a for a in answers if a.source == source], gaps, seed)
        if isinstance(of_source, Chosen):
            pairs.append(of_source)
        else:
            dropped[source] = of_source
    if not pairs:
        return None, dropped
    chosen = min(
        pairs, key=lambda p: (-p.better.reward, -p.gap, -p.better.share, _draw(seed, p.better))
    )
    dropped |= {p.better.source: BEATEN for p in pairs if p is not chosen}
    return chosen, dropped


def _of_one_source(
    answers: Sequence[Judged], gaps: tuple[float, float], seed: int | str
) -> Chosen | str:
    if len(answers) < 2:
        return FEW
    better = best(answers, seed)
    worse = min(answers, key=lambda a: (a.reward, _draw(seed, a)))
    if better is None:
        return CUT_OFF if any(a.reward == 1 for a in answers) or not answers[0].by_rule else WRONG
    gap = better.reward - worse.reward
    if worse.by_rule:
        return Chosen(better, worse) if gap > 0 else RIGHT
    if gap <= 0 or gap < gaps[0]:
        return BELOW
    return ABOVE if gap > gaps[1] else Chosen(better, worse)


def _draw(seed: int | str, answer: Judged) -> bytes:
    text = f"{seed}\n{answer.source}\n{answer.text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()
