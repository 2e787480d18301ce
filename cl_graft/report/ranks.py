"""Mean ranks over blocks, and which of them differ: Friedman's test and Nemenyi's critical difference.

Demsar, Statistical comparisons of classifiers over multiple data sets, JMLR 2006, section 3.2. A block is a scenario,
with an order of its tasks and a model. Its seeds and budgets are not blocks: they have its test examples and, for the
most part, its training, so each block counts once, by the mean over them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cl_graft.report.overview import column_of
from cl_graft.report.protocols import Cell, part

ALPHA = 0.05
LEAST = 5  # blocks of which a test is made; with fewer hardly any order of strategies could be told from chance
Block = tuple[str, tuple[str, ...], str]  # scenario whatever its order of tasks, that order, model


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of k strategies over some blocks, the best first: 1 for the highest score, ties share theirs.

    blocks: those that count. without: strategies that lack one of them, and are not ranked. p: Friedman's, by the F
    distribution of Iman and Davenport. critical: by how much two mean ranks differ that are told apart. Both are NaN
    where there is no test.
    """

    names: tuple[str, ...]
    ranks: tuple[float, ...]
    blocks: tuple[Block, ...]
    without: tuple[str, ...]
    p: float
    critical: float

    @property
    def tested(self) -> bool:
        """Whether there are blocks and strategies enough for a test."""
        return not math.isnan(self.p)

    def alike(self) -> list[tuple[int, int]]:
        """First and last place (0-based) of each longest run of strategies that were not told apart.

        All, where Friedman's test finds no difference; none without a test.
        """
        if not self.tested:
            return []
        if self.p >= ALPHA:
            return [(0, len(self.names) - 1)]
        runs: list[tuple[int, int]] = []
        for first, rank in enumerate(self.ranks):
            last = max(k for k, other in enumerate(self.ranks) if other - rank < self.critical)
            if last > first and (not runs or last > runs[-1][1]):
                runs.append((first, last))
        return runs


def ranked(cells: Sequence[Cell], of: str) -> Ranks:
    """Ranks by OP of the complete cells of one of `protocols.PARTS`, by label.

    A block counts where more than half of these strategies have it, at all budgets that any of them has there; a
    strategy is ranked where it has every block that counts.
    """
    found: dict[str, dict[Block, dict[str, list[float]]]] = {}
    for cell in cells:
        if cell["complete"] and part(cell) == of and cell["metrics"].get("op") is not None:
            scenario, model, budget = column_of(cell)
            by_budget = found.setdefault(cell["label"], {}).setdefault(
                (scenario, tuple(cell["tasks"]), model), {}
            )
            by_budget.setdefault(budget, []).append(cell["metrics"]["op"])
    budgets: dict[Block, set[str]] = {}
    for blocks in found.values():
        for block, by_budget in blocks.items():
            budgets.setdefault(block, set()).update(by_budget)
    whole = {
        label: {b for b, by_budget in blocks.items() if by_budget.keys() == budgets[b]}
        for label, blocks in found.items()
    }
    counting = [b for b in budgets if 2 * sum(b in own for own in whole.values()) > len(found)]
    scores = {
        label: [_mean(found[label][b]) for b in counting]
        for label, own in whole.items()
        if counting and own.issuperset(counting)
    }
    names, ranks, p, critical = mean_ranks(scores)
    without = tuple(label for label in found if label not in scores)
    return Ranks(names, ranks, tuple(counting), without, p, critical)


def _mean(by_budget: Mapping[str, Sequence[float]]) -> float:
    """The mean over budgets of the means over seeds, to a digit at which sums in another order are alike."""
    return round(float(np.mean([np.mean(seeds) for seeds in by_budget.values()])), 9)


def mean_ranks(
    scores: Mapping[str, Sequence[float]],
) -> tuple[tuple[str, ...], tuple[float, ...], float, float]:
    """Names and mean ranks, the best first, p and critical difference. scores: of each name, one a block."""
    from scipy.stats import rankdata

    if not scores:
        return (), (), math.nan, math.nan
    table = np.array(list(scores.values()), dtype=np.float64)  # (names, blocks)
    ranks = rankdata(-table, axis=0)
    order = sorted(zip(ranks.mean(axis=1).tolist(), scores, strict=True))
    k, blocks = table.shape
    p = critical = math.nan
    if blocks >= LEAST and k >= 3:
        p, critical = friedman(table), critical_difference(k, blocks)
    return tuple(name for _, name in order), tuple(rank for rank, _ in order), p, critical


def friedman(table: np.ndarray) -> float:
    """p of no difference between the rows of (names, blocks), three or more: Friedman's statistic, corrected for ties,
    by the F distribution, since its chi-square is too cautious (Iman and Davenport 1980)."""
    from scipy.stats import f, friedmanchisquare

    k, blocks = table.shape
    if (table == table[0]).all():
        return 1.0
    statistic = float(friedmanchisquare(*table).statistic)
    rest = blocks * (k - 1) - statistic
    if rest <= 1e-9:  # one order in all blocks
        return 0.0
    return float(f.sf((blocks - 1) * statistic / rest, k - 1, (k - 1) * (blocks - 1)))


def critical_difference(k: int, blocks: int) -> float:
    """Nemenyi's, of k mean ranks over so many blocks: q sqrt(k (k + 1) / (6 blocks)), q the studentized range over
    sqrt 2."""
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1 - ALPHA, k, math.inf)) / math.sqrt(2)
    return q * math.sqrt(k * (k + 1) / (6 * blocks))
