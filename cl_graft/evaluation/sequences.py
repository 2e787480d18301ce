"""Longest common subsequences, which ROUGE-L counts in words and edit similarity in characters."""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def common(a: Sequence[Hashable], b: Sequence[Hashable]) -> int:
    """Length of a longest common subsequence, by Hyyrö's bit-parallel recurrence (2004, Bit-parallel LCS-length
    computation revisited): one addition of len(a) bits for each element of b."""
    places: dict[Hashable, int] = {}
    for number, element in enumerate(a):
        places[element] = places.get(element, 0) | 1 << number
    whole = (1 << len(a)) - 1
    rows = whole
    for element in b:
        met = rows & places.get(element, 0)
        rows = ((rows + met) | (rows - met)) & whole
    return len(a) - rows.bit_count()
