"""Answers token by token: an answer leaves the batch where it ends, and the next prompt takes its place.

Transformers' `generate` keeps finished rows until the last one ends. Its continuous batching (5.23) gives the same
answers in float32, but took four times as long as `generate` on a processor, and tells nobody which rows it batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cl_graft.evaluation.batches import Family, families, room
from cl_graft.evaluation.likelihoods import Told
from cl_graft.evaluation.rows import Reader, Rows

Pick = Callable[[Tensor, list[int], list[int]], Tensor]


class Decoding:
    """Answers to prompts, given as tokens, none of them empty.

    most: tokens of an answer. ends: tokens that end one. pick: of scores (rows, V), the rows' prompts, and how many
    tokens have been said to each, the next tokens (rows,). process: scores of logits, given the tokens before them, or
    None. told: called before every forward pass with the prompts that its rows belong to; no prefix is shared then,
    for rows may be read by different weights.
    """

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        most: int,
        ends: Sequence[int],
        pick: Pick,
        process: Callable[[Tensor, Tensor], Tensor] | None,
        pad: int,
        told: Told | None,
    ):
        self.prompts, self.most, self.ends = prompts, most, set(ends)
        self.pick, self.process, self.told = pick, process, told
        self.reader, self.room = Reader(model, pad), room(model)
        self.said: list[list[int]] = [[] for _ in prompts]
        alike = families(prompts, alike=told is None)
        self._waiting = [(number, family) for family in alike for number in family.members]
        self._prefix: tuple[Family, Rows] | None = None
        self._rows, self._numbers = Rows([]), list[int]()

    def run(self) -> list[list[int]]:
        """Tokens of each answer, the one that ended it included."""
        while self._waiting or self._numbers:
            while group := self._admitted():
                self._read(group)
            self._step()
            self._make_room()
        return self.said

    def _admitted(self) -> list[tuple[int, Family]]:
        """Who is read next; none while few could be, since a pass of few rows takes as long as one of many."""
        group, running = list[tuple[int, Family]](), len(self._numbers)
        slots = self.room.slots(self._rows)
        for number, family in self._waiting:
            own = len(self.prompts[number]) + len(self.said[number])
            count = len(group) + 1
            # answers will grow: an eighth of their most is a guess, and `_make_room` is for where it fails
            width = max(own, self._rows.width) + self.most // 8
            fits = (
                family is self._waiting[0][1]
                and running + count <= self.room.rows
                and count * (own - family.prefix) <= self.room.tokens
                and (running + count) * width <= slots
            )
            if not fits and (group or running):
                break
            group.append((number, family))
        few = len(group) < min(len(self._waiting), running // 4)
        return [] if few else group

    def _read(self, group: list[tuple[int, Family]]) -> None:
        numbers, family = [number for number, _ in group], group[0][1]
        del self._waiting[: len(group)]
        self._tell(numbers)
        start = Rows([0] * len(group))
        if family.prefix:
            start = self._read_prefix(family).take([0] * len(group))
        texts = [[*self.prompts[i], *self.said[i]][family.prefix : -1] for i in numbers]
        self._rows.join(self.reader.read(start, texts))
        self._numbers += numbers

    def _read_prefix(self, family: Family) -> Rows:
        if self._prefix is None or self._prefix[0] is not family:
            text = self.prompts[family.members[0]][: family.prefix]
            self._prefix = family, self.reader.read(Rows([0]), [text])
        return self._prefix[1]

    def _step(self) -> None:
        """One token more for each row; those whose answers end leave."""
        numbers = self._numbers
        self._tell(numbers)
        before = [(self.said[i] or self.prompts[i])[-1:] for i in numbers]
        scores = self.reader.logits(self._rows, before, 1)[:, -1].float()
        self._rows.align([1] * len(numbers), 1)
        if self.process:
            scores = self.process(self._history(scores.device), scores)
        chosen = self.pick(scores, numbers, [len(self.said[i]) for i in numbers]).tolist()
        for number, token in zip(numbers, chosen, strict=True):
            self.said[number].append(token)
        going = [
            row
            for row, (number, token) in enumerate(zip(numbers, chosen, strict=True))
            if token not in self.ends and len(self.said[number]) < self.most
        ]
        self._keep(going)

    def _keep(self, rows: list[int]) -> None:
        if not rows:
            self._rows, self._numbers = Rows([]), []
        elif len(rows) < len(self._numbers):
            self._rows.keep(rows)
            self._numbers = [self._numbers[row] for row in rows]

    def _make_room(self) -> None:
        """Where answers outgrow the room, the rows that came last wait again, to be read with what they said."""
        count = len(self._numbers)
        if count and count * (self._rows.width + 1) > (slots := self.room.slots(self._rows)):
            stay = max(1, slots // (self._rows.width + 1))
            gone = self._numbers[stay:]
            whole = Family(gone, 0)
            self._waiting = [(number, whole) for number in gone] + self._waiting
            self._keep(list(range(stay)))

    def _tell(self, numbers: list[int]) -> None:
        if self.told:
            self.told(numbers)

    def _history(self, device: torch.device) -> Tensor:
        """What each row's next token follows, int64 (rows, longest); before it, its first token again."""
        texts = [[*self.prompts[i], *self.said[i]] for i in self._numbers]
        width = max(map(len, texts))
        filled = [[text[0]] * (width - len(text)) + text for text in texts]
        return torch.tensor(filled, device=device)


def likeliest(scores: Tensor, numbers: list[int], said: list[int]) -> Tensor:
    """The first of the highest scores of each row."""
    return scores.argmax(-1)


def drawn(count: int, most: int, seed: int) -> Pick:
    """Tokens drawn by their probabilities: each by a number of its prompt's own, whatever else is in the batch."""
    numbers_of = torch.rand(count, most, generator=torch.Generator().manual_seed(seed))

    def pick(scores: Tensor, numbers: list[int], said: list[int]) -> Tensor:
        upto = scores.softmax(-1).cumsum(-1)
        whole = upto[:, -1:]
        at = whole * numbers_of[numbers, said][:, None].to(scores.device)
        # where rounding makes `at` the whole, the token that completes it: those after it have no probability
        return torch.minimum((upto <= at).sum(-1), (upto < whole).sum(-1))

    return pick
