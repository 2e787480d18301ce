"""Which answers become data: hand-worked cases, and the rules over all that hypothesis thinks of."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_graft.transfer import select
from cl_graft.transfer.select import Judged, best, distinct, pair

ANY = (0.0, math.inf)


def ranked(source: str, text: str, reward: float, finished: bool = True) -> Judged:
    return Judged(source, text, reward, finished, by_rule=False)


def test_the_best_answer_by_a_rule_is_a_right_one() -> None:
    wrong, right = Judged("a", "4", 0.0), Judged("b", "5", 1.0)
    assert best([wrong, right], 0) is right
    assert best([wrong], 0) is None
    assert best([], 0) is None


def test_of_right_answers_that_of_the_source_which_is_right_most_often_is_taken() -> None:
    """One that guesses is right by its result now and then, and shows no way to it."""
    guessed = Judged("a", "7+7=17. #### 13", 1.0, share=0.25)
    worked = Judged("b", "7+6=13. #### 13", 1.0, share=1.0)
    assert all(best([guessed, worked], seed) is worked for seed in range(20))
    assert best([guessed], 0) is guessed
    wrong_of_a, wrong_of_b = (
        Judged("a", "#### 1", 0.0, share=0.25),
        Judged("b", "#### 2", 0.0, share=0.75),
    )
    often = Judged("b", worked.text, 1.0, share=0.75)
    for seed in range(20):
        chosen, _ = pair([guessed, wrong_of_a, often, wrong_of_b], ["a", "b"], ANY, seed)
        assert chosen and chosen.better is often


def test_the_best_answer_by_a_reward_model_is_the_highest() -> None:
    low, high = ranked("a", "x", -3.5), ranked("b", "y", -2.0)
    assert best([low, high], 0) is high
    assert best([low], 0) is low


def test_what_was_cut_off_is_never_what_to_say() -> None:
    cut, whole = ranked("a", "high but cut", 9.0, finished=False), ranked("a", "whole", 1.0)
    assert best([cut, whole], 0) is whole
    assert best([cut], 0) is None
    low = ranked("a", "low and cut", -1.0, finished=False)
    chosen, _ = pair([whole, low], ["a"], ANY, 0)
    assert chosen and (chosen.better, chosen.worse) == (whole, low)
    chosen, why = pair([cut, ranked("a", "cut, too", 2.0, finished=False)], ["a"], ANY, 0)
    assert (chosen, why) == (None, {"a": select.CUT_OFF})


def test_equal_answers_are_drawn_by_the_seed_and_not_by_their_place() -> None:
    answers = [Judged(source, str(i), 1.0) for i in range(8) for source in "ab"]
    assert all(best(answers, seed) is best(answers[::-1], seed) for seed in range(40))
    drawn = [best(answers, seed) for seed in range(40)]
    assert {one.source for one in drawn if one} == {"a", "b"}
    assert len({one.text for one in drawn if one}) > 4


def test_empty_and_repeated_answers_are_left_out() -> None:
    one, other = Judged("a", "5", 1.0), Judged("b", "5", 1.0)
    assert distinct([one, Judged("a", " \n", 0.0), Judged("a", "5", 1.0), other]) == [one, other]


def test_a_pair_is_of_one_source() -> None:
    """a's best is better than b's and b's worst is worse than a's: neither pair mixes them."""
    a = [ranked("a", "9", 9.0), ranked("a", "7", 7.0), ranked("a", "8", 8.0)]
    b = [ranked("b", "6", 6.0), ranked("b", "0", 0.0)]
    chosen, why = pair(b + a, ["a", "b"], ANY, 0)
    assert chosen and (chosen.better, chosen.worse, chosen.gap) == (a[0], a[1], 2.0)
    assert why == {"b": select.BEATEN}


def test_of_pairs_with_equal_best_answers_the_widest_is_taken() -> None:
    a = [ranked("a", "9", 9.0), ranked("a", "7", 7.0)]
    b = [ranked("b", "9", 9.0), ranked("b", "1", 1.0)]
    chosen, _ = pair(a + b, ["a", "b"], ANY, 0)
    assert chosen and chosen.better.source == "b"


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ((0.25, 0.25), None),
        ((0.0, 0.25), None),
        ((0.125, 1.0), None),
        ((0.375, 1.0), select.BELOW),
        ((0.0, 0.125), select.ABOVE),
    ],
)
def test_both_bounds_of_the_gap_are_kept(gaps: tuple[float, float], expected: str | None) -> None:
    answers = [ranked("a", "x", 0.5), ranked("a", "y", 0.25)]
    chosen, why = pair(answers, ["a"], gaps, 0)
    assert why.get("a") == expected and (chosen is None) == (expected is not None)


def test_best_and_worst_beyond_the_bound_are_not_replaced_by_a_narrower_pair() -> None:
    answers = [ranked("a", "x", 1.0), ranked("a", "y", 0.75), ranked("a", "z", 0.0)]
    assert pair(answers, ["a"], (0.0, 0.5), 0) == (None, {"a": select.ABOVE})


def test_a_source_out_of_bounds_leaves_the_place_to_another() -> None:
    a = [ranked("a", "9", 9.0), ranked("a", "1", 1.0)]
    b = [ranked("b", "6", 6.0), ranked("b", "5", 5.0)]
    chosen, why = pair(a + b, ["a", "b"], (0.0, 2.0), 0)
    assert chosen and chosen.better.source == "b"
    assert why == {"a": select.ABOVE}


def test_equal_rewards_make_no_pair() -> None:
    assert pair([ranked("a", "x", 1.0), ranked("a", "y", 1.0)], ["a"], ANY, 0)[1] == {
        "a": select.BELOW
    }


def test_why_a_rule_gives_no_pair() -> None:
    right = [Judged("a", "5", 1.0), Judged("a", "5.0", 1.0)]
    wrong = [Judged("b", "4", 0.0), Judged("b", "3", 0.0)]
    few = [Judged("c", "5", 1.0)]
    cut = [Judged("d", "5", 1.0, finished=False), Judged("d", "4", 0.0)]
    chosen, why = pair(right + wrong + few + cut, list("abcde"), ANY, 0)
    assert chosen is None
    assert why == {
        "a": select.RIGHT,
        "b": select.WRONG,
        "c": select.FEW,
        "d": select.CUT_OFF,
        "e": select.FEW,
    }


def test_bounds_are_the_reward_models_and_no_rules() -> None:
    chosen, _ = pair([Judged("a", "5", 1.0), Judged("a", "4", 0.0)], ["a"], (0.01, 0.1), 0)
    assert chosen and chosen.gap == 1.0


answers_of_three = st.lists(
    st.builds(
        Judged,
        st.sampled_from("abc"),
        st.text("xyz", max_size=2),
        st.integers(-3, 3).map(float),
        st.booleans(),
        st.just(False),
    ),
    max_size=12,
)


@given(answers_of_three, st.integers(0, 3), st.integers(0, 4))
def test_every_pair_keeps_every_rule(answers: list[Judged], low: int, high: int) -> None:
    different = distinct(answers)
    chosen, why = pair(different, "abc", (float(low), float(low + high)), 7)
    assert set(why) | ({chosen.better.source} if chosen else set()) == set("abc")
    if chosen:
        own = [a for a in different if a.source == chosen.better.source]
        assert chosen.better in own and chosen.worse in own and chosen.better.finished
        assert chosen.better.reward == max(a.reward for a in own if a.finished)
        assert chosen.worse.reward == min(a.reward for a in own)
        assert max(low, 0) <= chosen.gap <= low + high and chosen.gap > 0
        assert chosen.better.text.strip() and chosen.worse.text.strip()
    assert pair(different[::-1], "abc", (float(low), float(low + high)), 7)[0] == chosen
