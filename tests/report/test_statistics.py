"""Intervals and tests: hand-worked numbers, brute force over all draws, and how often a true null is rejected."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_graft.report.statistics import (
    holm,
    over_both,
    over_examples,
    over_normal,
    over_one_model,
    over_seeds,
    paired,
)


def strata(*values: float) -> list[tuple[float, np.ndarray]]:
    """One task alone."""
    return [(1.0, np.array(values, dtype=float))]


# --- intervals --------------------------------------------------------------------------------


def test_the_interval_over_seeds_is_students():
    """1, 2, 3: mean 2, deviation 1; t of 2 degrees of freedom at 97.5 % is 4.3027 (any table of t)."""
    found = over_seeds([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert found.mean == 2.0
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)


def test_the_interval_over_examples_is_that_of_all_draws():
    """Four examples drawn four times: 256 draws. Their 2.5 % and 97.5 % are listed here and drawn there."""
    values = [0.0, 1.0, 2.0, 7.0]
    means = sorted(sum(draw) / 4 for draw in itertools.product(values, repeat=4))
    found = over_examples(strata(*values))
    assert found.mean == 2.5
    assert (found.low, found.high) == (means[6], means[249])


def test_the_interval_over_outcomes_of_0_and_1_is_wilsons():
    """5 of 10 is [.2366, .7634], 0 of 10 [0, .2775] (Newcombe, Statistics in Medicine 1998, method 3)."""
    half, none = over_examples(strata(*[0, 1] * 5)), over_examples(strata(*[0] * 10))
    assert (half.low, half.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert (none.low, none.high) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_all_right_is_no_certainty():
    found = over_examples(strata(*[1] * 10))
    assert (found.low, found.high) == pytest.approx((1 - 0.2775, 1.0), abs=1e-4)


def test_tasks_are_drawn_apart_and_weigh_alike():
    """Half of each task's distance to its limit, as the sides of a right angle: 5 of 10, and 10 of 10."""
    found = over_examples([(0.5, np.ones(10)), (0.5, np.array([0.0, 1.0] * 5))])
    assert found.mean == 0.75
    assert found.high - 0.75 == pytest.approx(0.5 * 0.2634, abs=1e-4)
    assert 0.75 - found.low == pytest.approx(0.5 * math.hypot(0.2634, 0.2775), abs=1e-4)


def test_the_interval_over_examples_holds_the_truth_at_an_edge():
    """Two tasks of 20 at 95 % each: the bootstrap's holds it 87 times in 100."""
    rng = np.random.default_rng(3)
    tries = [
        over_examples([(0.5, (rng.random(20) < 0.95).astype(float)) for _ in range(2)])
        for _ in range(400)
    ]
    assert sum(found.low <= 0.95 <= found.high for found in tries) / 400 >= 0.93


def test_without_examples_the_interval_is_the_normal():
    found = over_normal(0.5, 0.1)
    assert (found.low, found.high) == pytest.approx((0.5 - 0.195996, 0.5 + 0.195996), abs=1e-5)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40))
def test_an_interval_holds_its_mean(values):
    for found in (over_seeds(values), over_examples(strata(*values))):
        assert found.low - 1e-9 <= found.mean <= found.high + 1e-9


# --- paired differences -----------------------------------------------------------------------


def test_equal_answers_are_no_difference():
    same = paired([strata(0, 0, 0, 0)] * 3)
    assert (same.mean, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    assert (same.seeds, same.examples) == (3, 12)


def test_a_difference_that_is_always_there_is_as_sure_as_a_sign_test():
    assert paired([strata(1, 1, 1)]).p == pytest.approx(2 * 0.5**3)
    assert paired([strata(*[1] * 40)] * 3).p < 1e-9


def test_an_interval_holds_0_where_p_is_not_below_5_per_cent():
    """Three examples that all say yes: a sign test has p = 1/4, and their bootstrap knows no doubt."""
    for found in (paired([strata(1, 1, 1)]), paired([strata(1), strata(1), strata(1)])):
        assert (found.low, found.mean, found.high) == (0.0, 1.0, 1.0)
        assert found.p == 0.25


@pytest.mark.parametrize("tests", ["ab", "aa"])
def test_the_standard_error_is_that_of_all_draws(tests):
    """Two seeds of two examples: the variance of all draws of seeds and of examples, by listing them; with test sets of
    their own, where a seed picked twice has two draws of its examples, and with one that has one draw for both.

    The seeds' part is scaled by n / (n - 1) = 2; one degree of freedom is left.
    """
    from scipy.stats import t

    one, two = (0.0, 1.0), (2.0, 5.0)
    means = np.array([0.5, 3.5])
    within = [
        [np.mean(draw) - np.mean(x) for draw in itertools.product(x, repeat=2)] for x in (one, two)
    ]
    examples = (
        [(e, e) for e in range(4)] if tests == "aa" else itertools.product(range(4), repeat=2)
    )
    draws = [
        np.mean(
            [
                math.sqrt(2) * (means[s] - 2) + within[s][e]
                for s, e in zip(seeds, those, strict=True)
            ]
        )
        for those in examples
        for seeds in itertools.product((0, 1), repeat=2)
    ]
    error = float(np.std(draws))
    found = paired([strata(*one), strata(*two)], tests)
    assert found.mean == 2.0
    assert (found.high - found.low) / 2 == pytest.approx(t.ppf(0.975, 1) * error)
    assert found.p == pytest.approx(2 * t.sf(2.0 / error, 1))


def test_one_draw_of_examples_serves_all_seeds_that_share_them():
    """Five seeds alike: their common examples vary as much as those of one seed, not a fifth as much."""
    seeds = [strata(*([0.0, 1.0] * 50))] * 5
    shared, apart = paired(seeds, "aaaaa"), paired(seeds)
    width = [found.high - found.low for found in (shared, apart)]
    assert width[0] / 2 == pytest.approx(2.776445 * 0.05, rel=1e-6)  # t of 4 degrees of freedom
    assert width[0] / width[1] == pytest.approx(math.sqrt(5))


def test_seeds_that_share_examples_in_part_are_between_the_two():
    """Four seeds alike, two and two on the same examples. Of two picks, half share them: (1 + 3 / 2) / 4 of the variance."""
    seeds = [strata(*([0.0, 1.0] * 50))] * 4
    widths = [found.high - found.low for found in (paired(seeds, "aabb"), paired(seeds, "aaaa"))]
    assert widths[1] / widths[0] == pytest.approx(math.sqrt(8 / 5))


def rejected(n: int, of_seeds: float, tries: int = 400) -> float:
    """How often two strategies that are equal on average are told apart at 5 %; 60 examples, which vary by 1.

    of_seeds: how much seeds vary, in standard errors of a seed's examples.
    """
    rng = np.random.default_rng(7)
    count = 0
    for _ in range(tries):
        effects = rng.normal(0, of_seeds / math.sqrt(60), n)
        seeds = [strata(*np.round(rng.normal(effect, 1, 60))) for effect in effects]
        count += paired(seeds).p < 0.05
    return count / tries


@pytest.mark.parametrize(
    ("n", "of_seeds", "low", "high"),
    [(1, 0.0, 0.03, 0.08), (2, 3.0, 0.0, 0.05), (3, 3.0, 0.0, 0.05), (3, 8.0, 0.02, 0.08), (5, 8.0, 0.03, 0.08), (3, 0.0, 0.0, 0.05), (5, 1.0, 0.0, 0.06)],
)  # fmt: skip
def test_a_true_null_is_rejected_about_one_time_in_twenty_or_less(n, of_seeds, low, high):
    """Where seeds differ by much more than their examples it is 5 %; where they do not, less."""
    assert low <= rejected(n, of_seeds) <= high


@pytest.mark.parametrize(("tests", "low", "high"), [("aaaaa", 0.0, 0.05), ("abcde", 0.1, 1.0)])
def test_seeds_on_the_same_examples_are_no_fresh_evidence(tests, low, high):
    """Two strategies, equal on average, differ on 60 examples that all five seeds share; taken for seeds with examples
    of their own they would be told apart one time in five."""
    rng, tries, count = np.random.default_rng(7), 200, 0
    for _ in range(tries):
        of_examples = rng.normal(0, 1, 60)
        seeds = [strata(*np.round(2 * (of_examples + rng.normal(0, 0.3, 60)))) for _ in tests]
        count += paired(seeds, tests).p < 0.05
    assert low <= count / tries <= high


# --- several comparisons ----------------------------------------------------------------------


def test_holm_by_hand():
    """.01 x 4, .02 x 3, .03 x 2 = .06 (as large as before), .5 x 1."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([]) == []
    assert holm([0.04]) == [0.04]


def test_what_was_not_tested_is_not_counted():
    found = holm([math.nan, 0.02, 0.03])
    assert math.isnan(found[0])
    assert found[1:] == pytest.approx([0.04, 0.04])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_rejects_what_its_steps_reject(ps):
    """The procedure as Holm states it: the smallest p against alpha / m, the next against alpha / (m - 1), ..."""
    alpha, rejected = 0.05, set()
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        if ps[i] * (len(ps) - rank) > alpha:
            break
        rejected.add(i)
    assert {i for i, p in enumerate(holm(ps)) if p <= alpha} == rejected


# --- how often an interval holds the truth ----------------------------------------------------


def outcomes(rng: np.random.Generator, seeds: int, of_seeds: float, shared: bool) -> np.ndarray:
    """(seeds, 200) of 0 and 1: examples differ in how hard they are, seeds in how good they are, the rest is noise."""
    hard = rng.normal(0, 1, (1 if shared else seeds, 200))
    skill = rng.normal(0, of_seeds, (seeds, 1))
    return (0.3 + hard + skill + rng.normal(0, 0.5, (seeds, 200)) > 0).astype(float)


@pytest.mark.parametrize("shared", [True, False], ids=["one test set", "own test sets"])
@pytest.mark.parametrize("of_seeds", [0.05, 0.5], ids=["alike", "far apart"])
@pytest.mark.parametrize("seeds", [3, 5, 10])
def test_an_interval_over_seeds_and_examples_holds_the_truth(
    seeds: int, of_seeds: float, shared: bool
) -> None:
    """The truth is the mean over all seeds and all examples there could be: a probit of a normal.

    95 times in 100; more where the parts that are put together are estimated from few seeds.
    """
    from scipy.special import ndtr

    rng, tries = np.random.default_rng(seeds), 400
    truth = ndtr(0.3 / math.sqrt(1 + 0.5**2 + of_seeds**2))
    tests = ["one"] * seeds if shared else list(range(seeds))
    held = {"both": 0, "seeds": 0}
    for _ in range(tries):
        scores = outcomes(rng, seeds, of_seeds, shared)
        both = over_both([[(1.0, x)] for x in scores], tests)
        alone = over_seeds(scores.mean(axis=1))
        held["both"] += both.low <= truth <= both.high
        held["seeds"] += alone.low <= truth <= alone.high
    assert 0.93 <= held["both"] / tries <= 0.995
    if shared and of_seeds < 0.1:  # what the spread of the seeds alone would have said was 95 %
        assert held["seeds"] / tries < {3: 0.9, 5: 0.8, 10: 0.65}[seeds]


def test_seeds_that_happen_to_be_alike_are_no_proof() -> None:
    """Two seeds with 10 of 20 right: Student's interval is a point; no interval is narrower than that of 40 examples."""
    half = strata(*[0, 1] * 10)
    assert over_seeds([0.5, 0.5]).low == 0.5
    one, apart = over_both([half, half], ["one", "one"]), over_both([half, half], ["a", "b"])
    wilson = 0.5 - over_examples(half).low
    assert 0.5 - one.low == pytest.approx(wilson)
    assert 0.5 - apart.low == pytest.approx(wilson / math.sqrt(2))
    assert (one.over, over_examples(half).over, over_seeds([0.5, 0.5]).over) == (
        "seeds, examples",
        "examples",
        "seeds alone",
    )


def test_the_base_is_one_model_and_its_interval_over_examples_alone() -> None:
    """The same answers by every seed are one test; on other examples they are another."""
    half = strata(*[0, 1] * 10)
    wilson = 0.5 - over_examples(half).low
    assert 0.5 - over_one_model([half] * 3, ["one"] * 3).low == pytest.approx(wilson)
    assert 0.5 - over_one_model([half] * 4, list("abcd")).low == pytest.approx(wilson / 2)


def test_shares_vary_less_than_outcomes_of_0_and_1() -> None:
    """Half the distance from the mean is a quarter of the variance: Wilson's limits for four times as many examples."""
    shares, outcomes = strata(*[0.25, 0.75] * 10), strata(*[0, 1] * 40)
    found, same = over_examples(shares), over_examples(outcomes)
    assert (found.low, found.high) == pytest.approx((same.low, same.high))
