"""Log-likelihoods of tokens after tokens: what they begin with alike is read once, the head taken at what is asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_graft.evaluation.batches import Family, families, front, left_padded, room
from cl_graft.evaluation.rows import Reader, Rows, can_read
from cl_graft.models.spread import device_of

Told = Callable[[list[int]], object]


class Tail(NamedTuple):
    """One of the texts that may follow a head: both by their numbers, and its tokens."""

    head: int
    number: int
    tokens: list[int]


def likelihoods(
    model: Any,
    pad: int,
    heads: Sequence[list[int]],
    tails: Sequence[Sequence[list[int]]],
    told: Told | None = None,
) -> list[list[float]]:
    """Natural-log probability of every one of a head's tails after it; no text is empty.

    pad: a token that stands for none. told: called before each forward pass with the numbers of the heads that its rows
    belong to; no prefix is shared then, for rows may be read by different weights.
    """
    result = [[0.0] * len(each) for each in tails]
    every = [[Tail(i, k, text) for k, text in enumerate(each)] for i, each in enumerate(tails)]
    found = (
        _Continued(model, pad, heads, every, told).run()
        if can_read(model)
        else _beside(model, pad, heads, every, told)
    )
    for tail, value in found:
        result[tail.head][tail.number] = value
    return result


class _Continued:
    """Heads are read but for their last token, and then, with it, what follows them, after the same keys and values."""

    def __init__(
        self,
        model: Any,
        pad: int,
        heads: Sequence[list[int]],
        tails: Sequence[Sequence[Tail]],
        told: Told | None,
    ):
        self.heads, self.tails, self.told = heads, tails, told
        self.reader, self.room = Reader(model, pad), room(model)

    def run(self) -> Iterator[tuple[Tail, float]]:
        for family in families(self.heads, alike=self.told is None):
            prefix = Rows([0])
            if family.prefix:
                self.reader.read(prefix, [self.heads[family.members[0]][: family.prefix]])
            waiting = list(family.members)
            while waiting:
                some = self._together(waiting, family, prefix)
                del waiting[: len(some)]
                if self.told:
                    self.told(some)
                rows = prefix.take([0] * len(some)) if family.prefix else Rows([0] * len(some))
                self.reader.read(rows, [self.heads[i][family.prefix : -1] for i in some])
                yield from self._follow(rows, some)
                del rows  # before others are read

    def _together(self, waiting: list[int], family: Family, prefix: Rows) -> list[int]:
        """Take those in front that one pass reads; as much room again is for what continues them."""
        slots = self.room.slots(prefix) * 2 // 5

        def fit(count: int) -> bool:
            length = len(self.heads[waiting[count - 1]])
            own = length - family.prefix
            return count * own <= self.room.tokens and count * length <= slots

        return waiting[: front(min(self.room.rows, len(waiting)), fit)]

    def _follow(self, rows: Rows, heads: list[int]) -> Iterator[tuple[Tail, float]]:
        """Every tail of these heads and its log-likelihood; tails of one length go together."""
        row = {head: k for k, head in enumerate(heads)}
        waiting = sorted((t for i in heads for t in self.tails[i]), key=lambda t: len(t.tokens))
        slots = self.room.slots(rows) * 2 // 5

        def fit(count: int) -> bool:
            longest = len(waiting[count - 1].tokens)
            held = count * (rows.width + longest)
            return count * longest <= self.room.logits and held <= slots

        while waiting:
            some = waiting[: front(min(self.room.rows, len(waiting)), fit)]
            del waiting[: len(some)]
            if self.told:
                self.told([tail.head for tail in some])
            texts = [[self.heads[t.head][-1], *t.tokens[:-1]] for t in some]
            copies = rows.take([row[tail.head] for tail in some])
            logits = self.reader.logits(copies, texts, len(texts[-1]))
            del copies
            for tail, own in zip(some, logits, strict=True):
                yield tail, _sum(own[: len(tail.tokens)], tail.tokens)


def _beside(
    model: Any,
    pad: int,
    heads: Sequence[list[int]],
    tails: Sequence[Sequence[Tail]],
    told: Told | None,
) -> Iterator[tuple[Tail, float]]:
    """Each head with each tail is a row, padded on the left."""
    given, most = inspect.signature(model.forward).parameters, room(model)
    waiting = sorted(
        (tail for each in tails for tail in each),
        key=lambda tail: len(heads[tail.head]) + len(tail.tokens),
    )

    def fit(count: int) -> bool:
        last = waiting[count - 1]
        longest = max(len(tail.tokens) for tail in waiting[:count])
        width = len(heads[last.head]) + len(last.tokens)
        return count * (longest + 1) <= most.logits and count * width <= most.tokens

    while waiting:
        some = waiting[: front(min(most.rows, len(waiting)), fit)]
        del waiting[: len(some)]
        if told:
            told([tail.head for tail in some])
        keep = max(len(tail.tokens) for tail in some) + 1
        ids, mask = left_padded([heads[tail.head] + tail.tokens for tail in some], pad)
        told_of = {
            "position_ids": (mask.cumsum(1) - 1).clamp_min(0),
            "attention_mask": mask,
            "input_ids": ids,
        }
        inputs = {name: x.to(device_of(model)) for name, x in told_of.items() if name in given}
        more = {"logits_to_keep": keep} if "logits_to_keep" in given else {}
        logits = model(**inputs, use_cache=False, **more).logits[:, -keep:-1]
        for tail, own in zip(some, logits, strict=True):
            yield tail, _sum(own[-len(tail.tokens) :], tail.tokens)


def _sum(logits: Tensor, tokens: Sequence[int]) -> float:
    """The sum of tokens' log-probabilities by logits (tokens, V)."""
    scores = logits.float().log_softmax(-1)
    picked = scores.gather(-1, torch.tensor(tokens, device=scores.device)[:, None])
    return picked.sum().item()
