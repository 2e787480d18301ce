"""Tokens laid side by side: worked out on paper, and held against every way that there is."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_graft.models import embedded, mini_gpt2
from cl_graft.transfer.align import Aligner, Table, commonest, counted, nearest, path, texts

WORDS = st.text("ab ", max_size=5)


def edits(one: str, other: str) -> int:
    """Levenshtein's recursion as it is defined."""
    if not one or not other:
        return len(one) + len(other)
    changed = edits(one[1:], other[1:]) + (one[0] != other[0])
    return min(changed, edits(one[1:], other) + 1, edits(one, other[1:]) + 1)


def ways(rows: int, columns: int) -> Iterator[list[tuple[int, int]]]:
    """Every way from (0, 0) to the last pair."""
    here = (rows - 1, columns - 1)
    if here == (0, 0):
        yield [here]
    for i, j in ((rows - 1, columns - 1), (rows - 1, columns), (rows, columns - 1)):
        if i and j:
            yield from ([*way, here] for way in ways(i, j))


@given(WORDS, st.lists(WORDS, min_size=1, max_size=4))
def test_edits_are_those_of_the_recursion_without_blanks(one: str, others: list[str]) -> None:
    wanted = [edits(one.replace(" ", ""), other.replace(" ", "")) for other in others]
    assert Table(others).edits(one).tolist() == wanted


def test_an_edit_costs_a_tenth_where_one_text_is_within_the_other() -> None:
    found = Table(["sitting", "kit", " kitten", "k"]).costs("kitten")
    assert found == pytest.approx([3, 0.3, 0, 0.5])


@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_the_way_is_the_cheapest_of_all(rows: int, columns: int, data: st.DataObject) -> None:
    drawn = st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns)
    costs = np.array(data.draw(drawn), float).reshape(rows, columns)
    found, every = path(costs), list(ways(rows, columns))
    assert found in every
    assert sum(costs[p] for p in found) == min(sum(costs[p] for p in way) for way in every)


def test_of_equal_ways_the_one_with_both_steps_at_once_is_taken() -> None:
    assert path(np.zeros((2, 3))) == [(0, 0), (0, 1), (1, 2)]


def aligned(source: list[str], target: list[str]) -> list[list[int]]:
    spelt = dict(enumerate([*source, *target]))
    ids = list(spelt)
    return Aligner(spelt, spelt)(ids[: len(source)], ids[len(source) :])


def test_an_alignment_on_paper() -> None:
    """`41` lies beside 4 and 1 at 0.1 each; beside one of them alone the rest would be moved, at a whole edit."""
    assert aligned(["41", "+", "2"], ["4", "1", "+", "2"]) == [[0], [0], [1], [2]]
    assert aligned(["4", "1", "+", "2"], ["41", "+", "2"]) == [[0, 1], [2], [3]]
    assert aligned([" Tom", " has"], ["Tom", " has"]) == [[0], [1]]


def test_vocabularies_by_edits() -> None:
    target = ["<eos>", "cat", " cat", "4", "1"]
    wanted = {9: " cat", 8: "<eos>", 7: "41", 6: "cut", 5: " cats"}
    # " cats" without its blank is an edit from both, "41" contains both of two: the first
    assert nearest(wanted, target) == {9: 2, 8: 0, 7: 3, 6: 1, 5: 1}


def test_vocabularies_by_how_often_tokens_lay_side_by_side() -> None:
    target = ["cat", "dog", "do", "x"]
    rows = [([7, 8], [0, 1, 2], [[0], [1], [1]]), ([8, 9], [1, 3], [[0], [0, 1]])]
    counts = counted(rows)
    assert counts == {(7, 0): 1, (8, 1): 2, (8, 2): 1, (8, 3): 1, (9, 3): 1}
    spelt = {7: "do", 8: "hound", 9: "y", 5: "z"}
    assert commonest(spelt, target, counts) == {7: 2, 8: 1, 9: 3}, "the same text goes first"
    even = {(8, 3): 2, (8, 1): 2}
    assert commonest({8: "dogs"}, target, even) == {8: 1}, "of equal counts the fewest edits"


def test_the_embedded_vocabularies_are_spelt_alike() -> None:
    llama, gpt2 = (texts(t) for t in (embedded.toy_tokenizer(), mini_gpt2.tokenizer()))
    for text in (" Tom", "Tom", "4", "\n", " ", "<eos>", "<bos>", "<pad>"):
        assert text in llama and text in gpt2
    assert "<unk>" in llama
