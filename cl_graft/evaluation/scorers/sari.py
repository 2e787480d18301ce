"""How well words are kept, deleted and added against prompt and reference: SARI of simplification (Xu et al. 2016)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from cl_graft.evaluation.scorers.base import scorer
from cl_graft.task import Example

LONGEST = 4  # words of an n-gram
# what mteval-v13a parts from words: signs, a full stop or comma but between digits, a dash after a digit
PARTED = (
    (re.compile(r"([{-~\[-` -&(-+:-@/])"), r" \1 "),
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)
ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}

Grams = Counter[tuple[str, ...]]


@scorer(
    reads=("prompt", "completion"),
    convention="SARI of Hugging Face's evaluate, small letters, 13a words, the whole prompt as its source; 0 to 1",
)
def sari(example: Example, answer: str) -> float:
    """The source is the prompt, with what it asks for, as in TRACE."""
    return similarity(example.prompt, answer, [example.completion])


def similarity(source: str, answer: str, references: Sequence[str]) -> float:
    """SARI of one answer, from 0 to 1: the mean of F of keeping, precision of deleting and F of adding, over n-grams of
    one to four words. A share of nothing is 1."""
    source_words, answer_words = tokens(source), tokens(answer)
    wanted = [tokens(reference) for reference in references]
    parts = []
    for n in range(1, LONGEST + 1):
        before = _times(grams(source_words, n), len(wanted))
        after = _times(grams(answer_words, n), len(wanted))
        right = sum((grams(words, n) for words in wanted), Counter())
        parts += [_kept(before, after, right), _deleted(before, after, right)]
        parts.append(_added(set(before), set(after), set(right)))
    return sum(parts) / len(parts)


def tokens(text: str) -> list[str]:
    """Words and signs in small letters as mteval-v13a parts them; of an empty text the empty word, as in evaluate."""
    text = text.lower().replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, sign in ENTITIES.items():
        text = text.replace(entity, sign)
    text = f" {text} "
    for pattern, by in PARTED:
        text = pattern.sub(by, text)
    return text.split() or [""]


def grams(words: Sequence[str], n: int) -> Grams:
    return Counter(tuple(words[k : k + n]) for k in range(len(words) - n + 1))


def _times(counts: Grams, number: int) -> Grams:
    return Counter({gram: number * count for gram, count in counts.items()})


def _kept(before: Grams, after: Grams, right: Grams) -> float:
    kept, wanted = before & after, before & right
    good = kept & right
    precision = sum(good[gram] / kept[gram] for gram in good) / len(kept) if kept else 1.0
    recall = good.total() / wanted.total() if wanted else 1.0
    return _f(precision, recall)


def _deleted(before: Grams, after: Grams, right: Grams) -> float:
    deleted = before - after
    good = deleted - right
    return sum(good[gram] / deleted[gram] for gram in good) / len(deleted) if deleted else 1.0


def _added(
    before: set[tuple[str, ...]], after: set[tuple[str, ...]], right: set[tuple[str, ...]]
) -> float:
    added, wanted = after - before, right - before
    good = len(added & right)
    return _f(good / len(added) if added else 1.0, good / len(wanted) if wanted else 1.0)


def _f(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0
