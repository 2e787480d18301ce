"""Mean ranks over blocks and the critical difference: Demsar's own example, and what is no block."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import f

from cl_graft.report.protocols import UNTOLD
from cl_graft.report.ranks import (
    LEAST,
    Ranks,
    critical_difference,
    friedman,
    mean_ranks,
    ranked,
)
from tests.report.test_overview import ordered
from tests.report.test_protocols import at

# Table 6 of Demsar 2006, JMLR 7: AUC of four variants of C4.5 on 14 data sets. Of voting it prints 0.975 twice and
# ranks 2 and 3, so the lower one has half a digit less here.
AUC = {
    "C4.5": "763 599 954 628 882 936 661 583 775 1000 940 619 972 957",
    "C4.5+m": "768 591 971 661 888 931 668 583 838 1000 962 666 981 978",
    "C4.5+cf": "771 590 968 654 886 916 609 563 866 1000 965 614 975 946",
    "C4.5+m+cf": "798 569 967 657 898 931 685 625 875 1000 962 669 974.5 970",
}
SCORES = {name: [float(x) / 1000 for x in told.split()] for name, told in AUC.items()}


def test_demsars_example() -> None:
    names, ranks, p, critical = mean_ranks(SCORES)
    assert dict(zip(names, np.round(ranks, 3).tolist(), strict=True)) == {
        "C4.5+m+cf": 1.964,
        "C4.5+m": 2.0,
        "C4.5+cf": 2.893,
        "C4.5": 3.143,
    }
    assert critical == pytest.approx(1.25, abs=0.005)
    squares = sum(rank**2 for rank in ranks)
    chi = 12 * 14 / (4 * 5) * (squares - 4 * 5**2 / 4)
    assert chi == pytest.approx(9.28, abs=0.005)  # as he prints it, without a correction for ties
    assert 13 * chi / (14 * 3 - chi) == pytest.approx(3.69, abs=0.005)
    # ties: pairs of iris, lung and primary tumor, 2^3 - 2 each, and all four of mushroom, 4^3 - 4
    corrected = chi / (1 - (3 * 6 + 60) / (14 * (4**3 - 4)))
    assert p == pytest.approx(f.sf(13 * corrected / (14 * 3 - corrected), 3, 39))
    assert 0.01 < p < 0.05
    found = Ranks(names, ranks, (), (), p, critical)
    assert found.alike() == [(0, 3)], "he tells C4.5 apart at 0.10 alone"


@pytest.mark.parametrize(
    ("k", "q"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (8, 3.031), (10, 3.164)]
)
def test_the_critical_values_are_those_of_demsars_table_5(k: int, q: float) -> None:
    assert critical_difference(k, 10) / math.sqrt(k * (k + 1) / 60) == pytest.approx(q, abs=0.002)


def test_one_order_in_all_blocks_and_none_at_all() -> None:
    table = np.array([[3.0] * 6, [2.0] * 6, [1.0] * 6])
    assert friedman(table) == 0.0
    assert friedman(np.ones((3, 6))) == 1.0
    assert friedman(np.array([[1.0, 2.0, 3.0], [2.0, 3.0, 1.0], [3.0, 1.0, 2.0]])) == 1.0


def test_runs_that_are_not_told_apart() -> None:
    def runs(p: float, *ranks: float) -> list[tuple[int, int]]:
        return Ranks(tuple("abcd"), ranks, (), (), p, 2.0).alike()

    assert runs(0.01, 1.0, 2.0, 3.5, 5.0) == [(0, 1), (1, 2), (2, 3)]
    assert runs(0.01, 1.0, 2.0, 2.9, 6.0) == [(0, 2)]  # the second run is in the first
    assert runs(0.01, 1.0, 3.0, 5.0, 7.0) == []  # a difference as large as the critical one is one
    assert runs(0.20, 1.0, 3.0, 5.0, 7.0) == [(0, 3)]  # nothing may be told apart
    assert runs(math.nan, 1.0, 2.0, 3.0, 4.0) == []


def of(label: str, *scores: float, **changes: Any) -> list[dict[str, Any]]:
    """A cell in each of so many scenarios."""
    return [at(label, x, scenario=f"s{k}", **changes) for k, x in enumerate(scores)]


@pytest.mark.parametrize("blocks", [LEAST - 1, LEAST])
def test_too_few_blocks_have_ranks_and_no_test(blocks: int) -> None:
    names = "abc"
    cells = [c for n, x in zip(names, (0.9, 0.5, 0.1), strict=True) for c in of(n, *[x] * blocks)]
    found = ranked(cells, UNTOLD)
    assert (found.names, found.ranks) == (tuple(names), (1.0, 2.0, 3.0))
    assert found.tested == (blocks == LEAST)
    assert found.alike() == ([] if blocks < LEAST else [(0, 1), (1, 2)])  # CD 1.48


def test_two_strategies_are_no_field_to_test() -> None:
    assert not ranked([*of("a", *[0.9] * 6), *of("b", *[0.1] * 6)], UNTOLD).tested


def test_seeds_and_budgets_are_no_blocks() -> None:
    """In scenario s, a is ahead by the mean of its seeds though b is by two of three; in t by that of budgets."""
    seeds = {"a": (0.9, 0.3, 0.3), "b": (0.4, 0.4, 0.4)}
    cells = [at(n, x, seed, scenario="s") for n, xs in seeds.items() for seed, x in enumerate(xs)]
    budgets = {"a": {"1%": 0.2, "10%": 0.9}, "b": {"1%": 0.3, "10%": 0.7}}
    cells += [
        at(n, x, scenario="t", budget=b) for n, own in budgets.items() for b, x in own.items()
    ]
    found = ranked(cells, UNTOLD)
    assert len(found.blocks) == 2
    assert dict(zip(found.names, found.ranks, strict=True)) == {"a": 1.0, "b": 2.0}


def test_orders_and_models_are_blocks() -> None:
    cells = [ordered(n, 0.5, tasks) for n in "ab" for tasks in ("math,code", "code,math")]
    cells += [c | {"model": "8b"} for c in cells]
    assert len(ranked(cells, UNTOLD).blocks) == 4


def test_who_lacks_a_block_is_not_ranked_and_what_few_have_is_no_block() -> None:
    cells = [*of("a", 0.9, 0.9, 0.9), *of("b", 0.5, 0.5), *of("c", 0.4, 0.4), *of("d", 0.8)]
    found = ranked(cells, UNTOLD)
    assert (found.names, found.ranks, found.without) == (("a", "b", "c"), (1.0, 2.0, 3.0), ("d",))
    assert len(found.blocks) == 2  # a alone has the third


def test_an_incomplete_cell_and_another_part_have_no_rank() -> None:
    cells = [*of("a", 0.9, 0.9), *of("b", 0.5, 0.5, budgeted=False)]
    cells += [c | {"complete": False} for c in of("c", 0.7, 0.7)]
    assert ranked(cells, UNTOLD).names == ("a",)
