"""Two tokenisations of one text laid side by side, and the tokens of one vocabulary in words of another.

After FuseLLM (Wan et al. 2024, arXiv 2401.10491) and FuseChat (arXiv 2408.07990). Tokens are compared as texts, by
edits: insertions, deletions and substitutions of a character.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLANKS = {"Ġ": " ", "▁": " ", "Ċ": "\n", "ĉ": "\t"}  # how vocabularies spell a blank
ROLES = ("bos", "eos", "pad", "unk")
CONTAINED = 0.1  # what an edit costs where one text is within the other


def texts(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of every token, as `of_id[id]`; a special token's is its role, the same in all vocabularies."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    found = [_spelt(token or "") for token in tokens]
    # where one token has several roles, as <|endoftext|>, it is what ends a text
    for role in ("pad", "unk", "bos", "eos"):
        if (number := getattr(tokenizer, f"{role}_token_id")) is not None:
            found[number] = f"<{role}>"
    return found


def _spelt(token: str) -> str:
    return "".join(BLANKS.get(letter, letter) for letter in token)


@dataclass(frozen=True)
class Table:
    """Texts to which others are compared, all at once."""

    of: Sequence[str]

    @cached_property
    def _bare(self) -> list[str]:
        return [text.replace(" ", "") for text in self.of]

    @cached_property
    def _letters(self) -> np.ndarray:
        """Code points of the texts without blanks, int32 (texts, longest), -1 after the end."""
        letters = np.full((len(self.of), max(map(len, self._bare), default=0)), -1, np.int32)
        for row, text in zip(letters, self._bare, strict=True):
            row[: len(text)] = [ord(letter) for letter in text]
        return letters

    def edits(self, text: str) -> np.ndarray:
        """Edits (Levenshtein 1966) between `text` and each of the table, both without blanks, int64 (texts,)."""
        letters = self._letters
        steps = np.arange(letters.shape[1] + 1)
        row = np.broadcast_to(steps, (len(letters), len(steps)))
        for count, letter in enumerate(text.replace(" ", ""), 1):
            best = np.minimum(row[:, 1:] + 1, row[:, :-1] + (letters != ord(letter)))
            first = np.full((len(letters), 1), count)
            # an insertion costs one a step: the least of all that come before, each so many steps away
            row = np.minimum.accumulate(np.hstack([first, best]) - steps, axis=1) + steps
        return row[np.arange(len(letters)), (letters >= 0).sum(1)]

    def costs(self, text: str) -> np.ndarray:
        """Edits, of which each costs a tenth where one text is within the other, float64 (texts,)."""
        bare = text.replace(" ", "")
        within = np.fromiter((bare in other or other in bare for other in self._bare), bool)
        return self.edits(text) * np.where(within, CONTAINED, 1.0)


def path(costs: np.ndarray) -> list[tuple[int, int]]:
    """The cheapest way from the first pair of tokens to the last (dynamic time warping, Sakoe and Chiba 1978).

    costs: of pairs, (source tokens, target tokens), neither of them none. A step goes on in one sequence or in both;
    of equal ones that in both comes first, then that in the source.
    """
    rows, columns = costs.shape
    total = [[math.inf] * (columns + 1) for _ in range(rows + 1)]
    total[0][0] = 0.0
    for i, row in enumerate(costs.tolist()):
        last, here = total[i], total[i + 1]
        for j, cost in enumerate(row):
            here[j + 1] = cost + min(last[j], last[j + 1], here[j])
    i, j = rows - 1, columns - 1
    way = [(i, j)]
    while i or j:
        before = ((i - 1, j - 1), (i - 1, j), (i, j - 1))
        i, j = min(before, key=lambda pair: total[pair[0] + 1][pair[1] + 1])
        way.append((i, j))
    return way[::-1]


class Aligner:
    """Lays sequences of two vocabularies side by side; what costs a pair of tokens is computed once.

    source, target: texts of tokens, {id: text}, of at least those ids that come in the sequences.
    """

    def __init__(self, source: Mapping[int, str], target: Mapping[int, str]):
        self.source, self.target = source, target
        self._table = Table(list(dict.fromkeys(target.values())))
        self._place = {text: place for place, text in enumerate(self._table.of)}
        self._costs: dict[str, np.ndarray] = {}

    def __call__(self, source: Sequence[int], target: Sequence[int]) -> list[list[int]]:
        """List the places in `source` that each token of `target` is laid beside, in order."""
        for token in source:
            if (text := self.source[token]) not in self._costs:
                self._costs[text] = self._table.costs(text)
        columns = [self._place[self.target[token]] for token in target]
        costs = np.stack([self._costs[self.source[token]][columns] for token in source])
        beside: list[list[int]] = [[] for _ in target]
        for i, j in path(costs):
            beside[j].append(i)
        return beside


def nearest(source: Mapping[int, str], target: Sequence[str]) -> dict[int, int]:
    """FuseLLM's vocabulary map: the token of the same text, or else that at the least cost; of equal ones the first.

    source: {id: text} of the tokens wanted. target: the text of every token.
    """
    same, table = _first(target), Table(target)
    return {
        token: same[text] if text in same else int(table.costs(text).argmin())
        for token, text in source.items()
    }


def commonest(
    source: Mapping[int, str], target: Sequence[str], counts: Mapping[tuple[int, int], int]
) -> dict[int, int]:
    """FuseChat's vocabulary map: the token of the same text, or else that which it was laid beside most often.

    counts: of pairs (source id, target id). Of equal ones that at the least cost, then the first; a token that was
    beside none has no place in the map.
    """
    same, found = _first(target), dict[int, int]()
    beside: dict[int, list[tuple[int, int]]] = {}
    for (token, other), count in sorted(counts.items()):
        beside.setdefault(token, []).append((other, count))
    for token, text in source.items():
        if text in same:
            found[token] = same[text]
        elif token in beside:
            costs = Table([target[other] for other, _ in beside[token]]).costs(text)
            ranked = zip(beside[token], costs, strict=True)
            found[token] = min(ranked, key=lambda x: (-x[0][1], x[1]))[0][0]
    return found


def counted(
    rows: Iterable[tuple[Sequence[int], Sequence[int], Sequence[Sequence[int]]]],
) -> Counter[tuple[int, int]]:
    """How often a source token was laid beside a target token. rows: source ids, target ids, places beside each."""
    return Counter(
        (source[place], token)
        for source, target, beside in rows
        for token, places in zip(target, beside, strict=True)
        for place in places
    )


def _first(target: Sequence[str]) -> dict[str, int]:
    """{text: the first token that has it}."""
    return {text: len(target) - 1 - n for n, text in enumerate(reversed(target))}
