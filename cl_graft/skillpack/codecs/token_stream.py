"""Entropy coding of whole numbers: a token of each goes through asymmetric numeral systems (Duda 2013, arXiv
1311.2540; `constriction`'s AnsCoder), the low bits that are left of it are packed as they are (packing.py).

A token is a number's length and its two bits after the first, as in an exponential Golomb code: below 8 the number
itself. How frequent each token is stands in tables of whole numbers, one for each range of contexts, so that nothing
depends on how a machine rounds. A context is what the reader knows of a number beforehand.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import constriction
import numpy as np
import torch

from cl_graft.skillpack.codecs import packing

BLOCK = 1 << 18  # numbers that are sorted by context at a time
TOKENS = 124  # of numbers of 32 bits
CONTEXTS = 256
PRECISION = 24  # bits of a frequency

Array = np.ndarray
AnsCoder: Any = constriction.stream.stack.AnsCoder
Categorical: Any = constriction.stream.model.Categorical


def split(z: Array) -> tuple[Array, Array, Array]:
    """(token uint8, length of the low bits uint8, low bits uint32) of numbers uint32 (n,)."""
    # without the bit after the first, no rounding to 24 bits carries into the next power of two
    length = ((z & ~(z >> 1)).astype(np.float32).view(np.int32) >> 23) - 126
    left = np.maximum(length - 3, 0).astype(np.uint8)
    head = z >> left
    return (left << 2) + head.astype(np.uint8), left, z - (head << left)


def tokens_of(bits: int) -> int:
    """How many tokens there are of numbers below 2**bits."""
    return 4 * bits - 4


def lengths(tokens: Array) -> Array:
    """How many low bits go with each token: uint8."""
    return np.maximum(tokens >> 2, 1) - np.uint8(1)


def joined(tokens: Array, low: Array) -> Array:
    """The inverse of `split`: uint32 (n,)."""
    left = lengths(tokens)
    return ((tokens - (left << 2)).astype(np.uint32) << left) + low


@dataclass(frozen=True)
class Table:
    """How frequent tokens are in the contexts from `first` up: weights (bytes, see `worth`) of `token` and its
    successors, of which the first and the last are not zero."""

    first: int
    token: int
    weights: bytes

    def frequencies(self) -> tuple[Array, Array]:
        """(the tokens that occur, their frequencies, which add up to 2**24), int64."""
        worths = worth(np.frombuffer(self.weights, np.uint8))
        used = np.flatnonzero(worths)
        worths = worths[used]
        found = np.maximum((worths << PRECISION) // worths.sum(), 1)
        found[found.argmax()] += (1 << PRECISION) - found.sum()
        return used + self.token, found


def worth(weights: Array) -> Array:
    """What a byte of a table stands for: a number of four bits at most, shifted; int64."""
    wide = weights.astype(np.int64)
    return np.where(wide < 16, wide, 8 + wide % 8 << np.maximum(wide // 8 - 1, 0))


def _weights(counts: Array) -> bytes:
    """The bytes that stand for the numbers nearest to these, or to so many times less where there are too many."""
    much = max(0, int(counts.max()).bit_length() - 33)
    counts = np.maximum(counts >> much, counts > 0)
    shift = np.maximum(np.frexp(counts.astype(np.float64))[1] - 4, 0)
    half = np.where(shift > 0, 1 << np.maximum(shift - 1, 0), 0)
    return (8 * shift + (counts + half >> shift)).astype(np.uint8).tobytes()


def tables_for(counts: Array) -> list[Table]:
    """The tables of fewest bytes, about; counts: int64 (CONTEXTS, TOKENS), how often a token stands in a context.

    Neighbouring contexts share a table where what they would gain by one of their own is less than its bytes.
    """
    groups: list[tuple[int, Array]] = []
    for context in np.flatnonzero(counts.any(1)):
        groups.append((int(context), counts[context]))
        while len(groups) > 1:
            (first, one), (_, other) = groups[-2:]
            if _bits(one + other) > _bits(one) + _bits(other):
                break
            groups[-2:] = [(first, one + other)]
    tables = []
    for place, (first, of) in enumerate(groups):
        there = np.flatnonzero(of)
        span = of[there[0] : there[-1] + 1]
        tables.append(Table(first if place else 0, int(there[0]), _weights(span)))
    return tables


def cost(counts: Array) -> float:
    """Bits that tokens and tables take, about; counts: as of `tables_for`. Low bits are not among them."""
    return sum(_bits(of) for of in counts[counts.any(1)])


def _bits(counts: Array) -> float:
    there = np.flatnonzero(counts)
    used = counts[there].astype(np.float64)
    entropy = float(used @ (np.log2(used.sum()) - np.log2(used)))
    return entropy + 8 * (3 + int(there[-1]) - int(there[0]) + 1)


def write_tables(tables: Sequence[Table]) -> bytes:
    """Each as first context, first token, number of weights, weights."""
    return b"".join(bytes((t.first, t.token, len(t.weights))) + t.weights for t in tables)


def read_tables(data: bytes, contexts: int = CONTEXTS, tokens: int = TOKENS) -> list[Table]:
    """The inverse of `write_tables`. Raises ValueError for bytes that are no tables of so many contexts and tokens."""
    tables, rest = list[Table](), memoryview(data)
    while rest:
        if len(rest) < 3 or len(rest) < 3 + rest[2]:
            raise ValueError("the last table is cut off.")
        (first, token, size), rest = rest[:3], rest[3:]
        table, rest = Table(first, token, bytes(rest[:size])), rest[size:]
        if not table.weights or not (table.weights[0] and table.weights[-1]):
            raise ValueError("a table does not begin and end with a token that occurs.")
        if (tables and table.first <= tables[-1].first) or (not tables and table.first):
            raise ValueError("the contexts of the tables do not go up from 0.")
        if table.first >= contexts or table.token + len(table.weights) > tokens:
            raise ValueError(f"a table goes beyond {contexts} contexts or {tokens} tokens.")
        tables.append(table)
    return tables


def encode(blocks: Sequence[tuple[Array, Array]], tables: Sequence[Table]) -> tuple[bytes, bytes]:
    """(low bits, words) of blocks (contexts uint8 (n,), numbers uint32 (n,)), each but the last of BLOCK numbers.

    The tables must have every token. A block is asked for once, the last one first.
    """
    models, low, coder = [_Model(table) for table in tables], list[bytes](), AnsCoder()
    for contexts, numbers in reversed(blocks):
        order, counts = _order(contexts, tables)
        tokens, left, rest = split(numbers[order])
        low.append(b"".join(_packed(left, rest)))
        end = len(tokens)
        for model, count in zip(reversed(models), reversed(counts), strict=True):
            model.push(coder, tokens[end - count : end])
            end -= count
    return b"".join(reversed(low)), coder.get_compressed().astype("<u4").tobytes()


def decode(
    contexts: Iterator[Array], tables: Sequence[Table], low: Array, words: Array
) -> Iterator[Array]:
    """The numbers of block after block, uint32, whose contexts are given. low, words: uint8.

    Raises ValueError, at the end at the latest, where low bits or words are not those of so many numbers.
    """
    coder = AnsCoder(words.view("<u4").astype(np.uint32))
    models = [_Model(table) for table in tables]
    for given in contexts:
        order, counts = _order(given, tables)
        pairs = zip(models, counts, strict=True)
        tokens = np.concatenate([model.pop(coder, count) for model, count in pairs])
        rest, low = _unpacked(lengths(tokens), low)
        numbers = np.empty(len(given), np.uint32)
        numbers[order] = joined(tokens, rest)
        yield numbers
    if len(low) or not coder.is_empty():
        raise ValueError("the stream goes on after the last number: it is of another base's.")


def check_words(words: Array) -> None:
    """Raise ValueError where the last word, of 4 bytes, is zero. words: uint8."""
    if len(words) and not words[-4:].any():
        raise ValueError("the last word of the stream is zero.")


class _Model:
    """A table as the coder knows it. One that has a single token says all by itself."""

    def __init__(self, table: Table):
        used, frequencies = table.frequencies()
        self.used = used.astype(np.uint8)
        self.place = np.full(TOKENS, -1, np.int32)
        self.place[self.used] = np.arange(len(self.used))
        # the coder gives each of them 1 of 2**24 beforehand
        shares = (frequencies - 1).astype(np.float64)
        self.model = Categorical(shares, perfect=False) if len(shares) > 1 else None

    def push(self, coder: Any, tokens: Array) -> None:
        if self.model is not None and len(tokens):
            coder.encode_reverse(self.place[tokens], self.model)

    def pop(self, coder: Any, count: int) -> Array:
        if self.model is None or not count:
            return np.full(count, self.used[0], np.uint8)
        return self.used[coder.decode(self.model, count)]


def _order(contexts: Array, tables: Sequence[Table]) -> tuple[Array, list[int]]:
    """(the order in which a block is coded: by table, then by place; how many numbers each table has)."""
    if not tables:
        raise ValueError("there are numbers, but no table.")
    of = np.zeros(CONTEXTS, np.uint8)
    for place, table in enumerate(tables):
        of[table.first :] = place
    mine = of[contexts]
    return mine.argsort(kind="stable"), np.bincount(mine, minlength=len(tables)).tolist()


def _by_length(left: Array) -> tuple[Array, list[tuple[int, int]]]:
    """(the order of the low bits of a block: by length, then by place; (length, how many) of each that is there)."""
    counts = np.bincount(left)
    there = [(int(width), int(counts[width])) for width in counts.nonzero()[0]]
    return left.argsort(kind="stable"), there


def _packed(left: Array, low: Array) -> Iterator[bytes]:
    """The low bits of a block: those of one bit, those of two, and so on, each a stream of its own."""
    order, there = _by_length(left)
    rest = low[order].astype(np.int64)
    for width, count in there:
        if width:
            yield packing.pack(torch.from_numpy(rest[:count]), width).numpy().tobytes()
        rest = rest[count:]


def _unpacked(left: Array, low: Array) -> tuple[Array, Array]:
    """(the low bits of a block, uint32, what of the bytes is left)."""
    order, there = _by_length(left)
    found, parts = np.empty(len(left), np.uint32), []
    for width, count in there:
        size = packing.packed_bytes(count, width)
        part = packing.unpack(torch.from_numpy(low[:size]), count, width).numpy() if width else None
        parts.append(np.zeros(count, np.uint32) if part is None else part.astype(np.uint32))
        low = low[size:]
    found[order] = np.concatenate(parts)
    return found, low
