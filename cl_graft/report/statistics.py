"""Intervals over seeds, and whether one strategy is better than another.

A score is a weighted sum of means over test examples: of each task, or of each suite of a task. `Strata` are those
examples, an array a task or suite with its weight.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cl_graft.matrix import FloatArray

Strata = Sequence[tuple[float, FloatArray]]

LEVEL = 0.95
DRAWS = 2000  # of which a standard error is taken: it is right to 2 %
FINE = 10_000  # of which a tail is taken
MANY = 64  # more different outcomes than these are drawn one by one


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, whose ends are NaN where nothing tells them.

    over: what varies, `seeds` (Student's t) or `examples` (bootstrap, or the normal where they are not on disk).
    """

    mean: float
    low: float
    high: float
    over: str


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval and two-sided p, from so many seeds with so many examples in all."""

    mean: float
    low: float
    high: float
    p: float
    seeds: int
    examples: int


def over_seeds(values: Sequence[float]) -> Interval:
    """Mean and Student's t interval of two values or more, one a seed: m ± t s / sqrt(n) with n - 1 degrees of freedom.

    Student, The probable error of a mean, Biometrika 1908.
    """
    x = np.asarray(values, dtype=np.float64)
    half = _t(x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)
    return Interval(float(x.mean()), float(x.mean()) - half, float(x.mean()) + half, "seeds")


def over_examples(strata: Strata) -> Interval:
    """Score of one seed and its percentile bootstrap interval, examples drawn anew within each stratum.

    Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    mean = _mean(strata)
    drawn = mean + _noise([strata], FINE, np.random.default_rng(0))[:, 0]
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(mean, float(low), float(high), "examples")


def over_normal(mean: float, stderr: float) -> Interval:
    """Of a mean of which only the standard error is known."""
    from scipy.special import ndtri

    half = float(ndtri((1 + LEVEL) / 2)) * stderr
    return Interval(mean, mean - half, mean + half, "examples")


def paired(seeds: Sequence[Strata], shared: bool = False) -> Difference:
    """The mean difference of two strategies by a hierarchical bootstrap: seeds are drawn anew, then their examples.

    seeds: of each seed, the differences example by example, so that the draws are paired. shared: all seeds were
    tested on the same examples, of which one draw then serves all of them; else each seed has examples of its own.

    One seed: percentile interval and achieved significance level over its examples (Efron and Tibshirani 1993, 13
    and 15), a statement about this seed alone. Several: Student's t on the bootstrap's standard error (the same, 12.5),
    since the percentiles of a bootstrap are too narrow for few seeds (Hesterberg, What teachers should know about the
    bootstrap, The American Statistician 2015); the seeds' part is scaled by n / (n - 1) for the same reason, and the
    degrees of freedom are Satterthwaite's (Biometrics Bulletin 1946), n - 1 of them for the seeds' part. Where seeds
    have examples of their own this counts the noise of examples in both parts, so it rejects too seldom rather
    than too often. No p is smaller than that of a sign test on as many examples that differ.
    """
    n, rng = len(seeds), np.random.default_rng(0)
    means = np.array([_mean(strata) for strata in seeds])
    mean = float(means.mean())
    examples = sum(x.size for strata in seeds for _, x in strata)
    differ = sum(int(np.count_nonzero(x)) for strata in seeds for _, x in strata)
    least = min(1.0, 2.0 * 0.5**differ)
    noise = _noise(seeds, FINE if n == 1 else DRAWS, rng, shared)
    if n == 1:
        drawn = mean + noise[:, 0]
        low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        tail = 1 + min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
        p = min(1.0, 2.0 * tail / (FINE + 1))
        return Difference(mean, float(low), float(high), max(p, least), n, examples)
    error = _hierarchical(means, noise, rng, shared)
    of_seeds = float(means.var(ddof=1)) / n
    freedom = (n - 1) * max(1.0, error**2 / of_seeds) ** 2 if of_seeds > 1e-12 else 1e9
    half = _t(freedom) * error
    p = max(_p(mean, error, freedom), least)
    return Difference(mean, mean - half, mean + half, p, n, examples)


def holm(ps: Sequence[float]) -> list[float]:
    """Adjusted p values, of which those below alpha may be rejected together; NaN is no test and stays.

    Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 1979.
    """
    tested = sorted((p, i) for i, p in enumerate(ps) if not math.isnan(p))
    adjusted, most = list(ps), 0.0
    for rank, (p, i) in enumerate(tested):
        most = max(most, min(1.0, (len(tested) - rank) * p))
        adjusted[i] = most
    return adjusted


def _hierarchical(
    means: FloatArray, noise: FloatArray, rng: np.random.Generator, shared: bool
) -> float:
    """Standard error of the mean over seeds that are drawn anew, each with one of the draws of its examples."""
    draws, n = noise.shape
    centred = math.sqrt(n / (n - 1)) * (means - means.mean())
    picks = rng.integers(0, n, (draws, n))
    rows = np.arange(draws)[:, None]
    if not shared:  # a seed drawn twice is drawn with different examples
        rows = (rows + np.arange(n)) % draws
    return float((centred[picks] + noise[rows, picks]).mean(axis=1).std())


def _noise(
    seeds: Sequence[Strata], draws: int, rng: np.random.Generator, shared: bool = False
) -> FloatArray:
    """(draws, seeds): by how much each seed's score changes when its examples are drawn anew."""
    found = np.zeros((draws, len(seeds)))
    if shared:
        for parts in zip(*seeds, strict=True):
            values = np.column_stack([x for _, x in parts])
            found += parts[0][0] * _redrawn(values, draws, rng)
        return found
    for s, strata in enumerate(seeds):
        for weight, x in strata:
            found[:, s] += weight * _redrawn(x[:, None], draws, rng)[:, 0]
    return found


def _redrawn(values: FloatArray, draws: int, rng: np.random.Generator) -> FloatArray:
    """(N, k) -> (draws, k): means of N rows drawn with replacement, less the mean of all of them.

    Rows that are alike are drawn together, by how many there are of them, which is the same and much less work.
    """
    size = len(values)
    rows, counts = np.unique(values, axis=0, return_counts=True)
    rows = rows - values.mean(axis=0)
    if len(rows) <= MANY:
        return rng.multinomial(size, counts / size, size=draws) @ rows / size
    centred = values - values.mean(axis=0)
    step = max(1, 4_000_000 // (size * values.shape[1]))
    return np.concatenate(
        [
            centred[rng.integers(0, size, (min(step, draws - k), size))].mean(axis=1)
            for k in range(0, draws, step)
        ]
    )


def _mean(strata: Strata) -> float:
    return float(sum(weight * x.mean() for weight, x in strata))


def _t(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _p(mean: float, error: float, freedom: float) -> float:
    from scipy.special import stdtr

    if not error:
        return 0.0 if mean else 1.0
    return float(2 * stdtr(freedom, -abs(mean) / error))
