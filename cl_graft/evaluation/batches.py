"""What goes into one forward pass: as many rows as a share of the weights' memory holds, and what their texts share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from cl_graft.evaluation.rows import Rows

BATCH = 64  # rows at most, alike for every cell of a matrix: scores must not move with the batch
FLOOR = 1 << 28  # bytes: beside a model of a few megabytes the interpreter is what takes memory
LEAST, MEMBERS = 8, 4  # tokens, and texts that share them, from which on they are read once
ACTIVE = 16  # values of a token in a forward pass, in hidden sizes: its residual, queries, keys, the MLP's inner ones


@dataclass(frozen=True)
class Room:
    """What one batch may take. It follows from the model alone, so that the same texts always go together.

    rows: at most. cache: bytes of the keys and values that are held. tokens: of one forward pass. logits: tokens whose
    logits one forward pass gives. All together make up at most half the weights' bytes, or FLOOR where that is more.
    """

    rows: int
    cache: int
    tokens: int
    logits: int

    def slots(self, rows: Rows) -> int:
        """Tokens that may be held, by what those of these rows take; before any is read, those of one pass."""
        return self.cache // rows.slot if rows.slot else self.tokens


def room(model: Any) -> Room:
    """The room beside a model: seven tenths for keys and values, one for a pass, one for logits, and the
    allocator has its share."""
    config, weights = model.config.get_text_config(), list(model.parameters())
    size = max(x.element_size() for x in weights)
    tenth = max(FLOOR, sum(x.nbytes for x in weights) // 2) / 10
    return Room(
        rows=BATCH,
        cache=int(7 * tenth),
        tokens=max(1, int(tenth / (ACTIVE * config.hidden_size * size))),
        logits=max(1, int(tenth / (4 * config.vocab_size))),
    )


@dataclass(frozen=True)
class Family:
    """Texts that begin alike. members: their numbers, the shortest first. prefix: tokens that all of them begin with,
    of none all; 0 where it is not worth a pass of its own."""

    members: Sequence[int]
    prefix: int


def families(texts: Sequence[Sequence[int]], alike: bool = True) -> list[Family]:
    """Sort texts by what they begin with: those that share LEAST tokens with MEMBERS - 1 others, and last the rest.

    alike: else none are sorted together.
    """
    begun: dict[tuple[int, ...], list[int]] = {}
    for number in sorted(range(len(texts)), key=lambda i: (len(texts[i]), i)):
        begun.setdefault(tuple(texts[number][:LEAST]), []).append(number)
    found, rest = list[Family](), list[int]()
    for members in begun.values():
        shared = common([texts[i] for i in members]) if alike and len(members) >= MEMBERS else 0
        if shared >= LEAST:
            found.append(Family(members, shared))
        else:
            rest += members
    rest.sort(key=lambda i: (len(texts[i]), i))
    return [*found, Family(rest, 0)] if rest else found


def front(count: int, fit: Callable[[int], bool]) -> int:
    """How many of `count` go together: as long as one more would `fit`, and one in any case."""
    return next((n for n in range(1, count) if not fit(n + 1)), count)


def common(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all of the texts begin with, the last one of each left out."""
    low, high = min(map(list, texts)), max(map(list, texts))  # what they share, all between do
    most = min(map(len, texts)) - 1
    return next((k for k in range(most) if low[k] != high[k]), most)


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, int64 (rows, longest)."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row)
        mask[index, width - len(row) :] = 1
    return ids, mask
