"""Intervals over seeds, and whether one strategy is better than another.

A score is a weighted sum of means over test examples: of each task, or of each suite of a task. `Strata` are those
examples, an array a task or suite with its weight.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cl_graft.matrix import FloatArray

Strata = Sequence[tuple[float, FloatArray]]

LEVEL = 0.95
DRAWS = 10_000  # of which a tail is taken
MANY = 64  # more different outcomes than these are drawn one by one


BOTH, SEEDS, EXAMPLES = "seeds, examples", "seeds alone", "examples"


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval, whose ends are NaN where nothing tells them.

    over: what is drawn anew in it, BOTH, SEEDS (the test examples are taken as they are) or EXAMPLES (of one model).
    """

    mean: float
    low: float
    high: float
    over: str = ""


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

    Student, The probable error of a mean, Biometrika 1908. Of these test examples alone: seeds that share them are
    wrong about them together, which their spread does not show.
    """
    half, mean = _seeds_part(values), float(np.mean(values))
    return Interval(mean, mean - half, mean + half, SEEDS)


def over_examples(strata: Strata) -> Interval:
    """Score of one model with limits over its examples, as `over_both` has them."""
    return _joined(strata, 0.0, EXAMPLES)


def over_both(seeds: Sequence[Strata], tests: Sequence[Hashable]) -> Interval:
    """Score with its interval over seeds and test examples, both drawn anew.

    seeds: the scores of each seed. tests: of each seed, what names its test set; examples of a set that several seeds
    share are drawn once for all of them, by the means of their scores, while the spread of seeds with sets of their
    own has the noise of examples in it already. Seeds that happen to be alike are no proof: no interval is narrower
    than that over the examples.

    The seeds' part is Student's, as `over_seeds`. Limits of a stratum's mean are Wilson's (Probable inference, Journal
    of the American Statistical Association 1927) where scores are within 0 and 1, for as many outcomes of 0 and 1 as
    would vary as the scores do (the effective sample size of Korn and Graubard, Survey Methodology 1998): a bootstrap
    of examples that are all right knows no doubt. For other scores they are those of a percentile bootstrap (Efron and
    Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13). All distances from the means are put together as
    independent errors are (Zou and Donner, Construction of confidence limits about effect measures, Statistics in
    Medicine 2008).
    """
    if len(seeds) == 1:
        return over_examples(seeds[0])
    shared = [test for test in dict.fromkeys(tests) if list(tests).count(test) > 1]
    half = _seeds_part([_mean(strata) for strata in seeds])
    found = _joined(_pooled(seeds, tests, shared), half, BOTH)
    least, mean = over_one_model(seeds, tests), float(np.mean([_mean(x) for x in seeds]))
    below = max(found.mean - found.low, least.mean - least.low)
    above = max(found.high - found.mean, least.high - least.mean)
    return Interval(mean, mean - below, mean + above, BOTH)


def over_one_model(seeds: Sequence[Strata], tests: Sequence[Hashable]) -> Interval:
    """Score of a model that is the same for all seeds, as the base is: test sets are drawn anew, and nothing else."""
    return _joined(_pooled(seeds, tests, dict.fromkeys(tests)), 0.0, EXAMPLES)


def over_normal(mean: float, stderr: float) -> Interval:
    """The normal interval of one model's mean, of which only the standard error over its examples is known."""
    half = _z() * stderr
    return Interval(mean, mean - half, mean + half, "" if math.isnan(stderr) else EXAMPLES)


def paired(seeds: Sequence[Strata], tests: Sequence[Hashable] = ()) -> Difference:
    """The mean difference of two strategies by a hierarchical bootstrap: seeds are drawn anew, then their examples.

    seeds: of each seed, the differences example by example, so that the draws are paired. tests: of each seed, what
    names its test set; one draw of examples serves all seeds of the same. Without them every seed has its own.

    One seed: percentile interval and achieved significance level over its examples (Efron and Tibshirani 1993, 13 and
    15), a statement about this seed alone. Several: Student's t on the bootstrap's standard error (the same, 12.5),
    in closed form, since the percentiles of a bootstrap are too narrow for few seeds (Hesterberg, What teachers
    should know about the bootstrap, The American Statistician 2015); the seeds' part is scaled by n / (n - 1) for the
    same reason. The degrees of freedom are n - 1 whatever the examples' part is: Satterthwaite's, which would credit
    it, are estimated from the few seeds and run wild where those happen to be alike. Where seeds have examples of
    their own this counts the noise of examples in both parts, so it rejects too seldom rather than too often.

    No p is smaller than that of a sign test on as many examples that differ, and an interval holds 0 where p says so.
    """
    n = len(seeds)
    means = np.array([_mean(strata) for strata in seeds])
    mean = float(means.mean())
    examples = sum(x.size for strata in seeds for _, x in strata)
    differ = sum(int(np.count_nonzero(x)) for strata in seeds for _, x in strata)
    if n == 1:
        rng = np.random.default_rng(0)
        noise = [weight * _redrawn(x, rng) for weight, x in seeds[0]]
        drawn = mean + np.sum(noise, axis=0)
        low, high = _percentiles(drawn)
        tail = 1 + min(np.count_nonzero(drawn <= 0), np.count_nonzero(drawn >= 0))
        p = min(1.0, 2.0 * tail / (DRAWS + 1))
    else:
        error = _hierarchical(means, seeds, tests or range(n))
        half = _t(n - 1) * error
        low, high, p = mean - half, mean + half, _p(mean, error, n - 1)
    p = max(p, min(1.0, 2.0 * 0.5**differ))
    if p > 1 - LEVEL:
        low, high = min(low, 0.0), max(high, 0.0)
    return Difference(mean, low, high, p, n, examples)


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


def _hierarchical(means: FloatArray, seeds: Sequence[Strata], tests: Sequence[Hashable]) -> float:
    """Standard error of the mean over seeds that are drawn anew, each with its examples drawn anew: that of all draws.

    A mean of n picked seeds varies with which those are, and with the noise of their examples. Two picks of the same
    test set share its draw; a seed that is alone with its test set and picked twice has a draw of its own each time.
    """
    n = len(seeds)
    of_seeds = float(means.var()) * n / (n - 1)
    noise = _noise(seeds, tests)
    shared = noise.copy()
    for k, test in enumerate(tests):
        if list(tests).count(test) == 1:
            shared[k, k] = 0.0
    of_examples = float(np.trace(noise)) / n + (n - 1) * float(shared.mean())
    return math.sqrt((of_seeds + of_examples) / n)


def _noise(seeds: Sequence[Strata], tests: Sequence[Hashable]) -> FloatArray:
    """(seeds, seeds): covariance of their scores where the examples of every test set are drawn anew."""
    noise = np.zeros((len(seeds), len(seeds)))
    for test in dict.fromkeys(tests):
        those = [k for k, other in enumerate(tests) if other == test]
        for parts in zip(*(seeds[k] for k in those), strict=True):
            values = np.column_stack([x - x.mean() for _, x in parts])
            noise[np.ix_(those, those)] += (parts[0][0] / len(values)) ** 2 * (values.T @ values)
    return noise


def _seeds_part(values: Sequence[float]) -> float:
    """Half the width of Student's interval."""
    x = np.asarray(values, dtype=np.float64)
    return _t(x.size - 1) * float(x.std(ddof=1)) / math.sqrt(x.size)


def _pooled(
    seeds: Sequence[Strata], tests: Sequence[Hashable], chosen: Iterable[Hashable]
) -> list[tuple[float, FloatArray]]:
    """Strata of the chosen test sets, each with the mean scores of the seeds that share it and with their weight."""
    parts = []
    for test in chosen:
        those = [strata for strata, name in zip(seeds, tests, strict=True) if name == test]
        for same in zip(*those, strict=True):
            weight = same[0][0] * len(those) / len(seeds)
            parts.append((weight, np.mean([x for _, x in same], axis=0)))
    return parts


def _joined(strata: Strata, half: float, over: str) -> Interval:
    """The mean of strata with the distances of their limits and `half` put together."""
    mean, rng = _mean(strata), np.random.default_rng(0)
    limits = [(weight, float(x.mean()), *_limits(x, rng)) for weight, x in strata]
    below = math.hypot(half, *(weight * (m - low) for weight, m, low, _ in limits))
    above = math.hypot(half, *(weight * (high - m) for weight, m, _, high in limits))
    return Interval(mean, mean - below, mean + above, over)


def _redrawn(x: FloatArray, rng: np.random.Generator) -> FloatArray:
    """(N,) -> (DRAWS,): means of N values drawn with replacement, less the mean of all of them.

    Values that are alike are drawn together, by how many there are of them, which is the same and much less work.
    """
    values, counts = np.unique(x, return_counts=True)
    if len(values) <= MANY:
        return rng.multinomial(x.size, counts / x.size, size=DRAWS) @ (values - x.mean()) / x.size
    step = max(1, 4_000_000 // x.size)
    return np.concatenate(
        [
            (x - x.mean())[rng.integers(0, x.size, (min(step, DRAWS - k), x.size))].mean(axis=1)
            for k in range(0, DRAWS, step)
        ]
    )


def _limits(x: FloatArray, rng: np.random.Generator) -> tuple[float, float]:
    """Both limits of a stratum's mean."""
    if x.min() < 0 or x.max() > 1:
        return _percentiles(x.mean() + _redrawn(x, rng))
    p, z, spread = float(x.mean()), _z(), float(x.var())
    n = x.size * p * (1 - p) / spread if spread > 1e-12 else x.size
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [(middle + way * half) / (1 + z * z / n) for way in (-1, 1)]
    return min(ends[0], p), max(ends[1], p)  # at 0 and 1 they differ from p in the last digit


def _percentiles(drawn: FloatArray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _mean(strata: Strata) -> float:
    return float(sum(weight * x.mean() for weight, x in strata))


def _z() -> float:
    from scipy.special import ndtri

    return float(ndtri((1 + LEVEL) / 2))


def _t(freedom: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(freedom, (1 + LEVEL) / 2))


def _p(mean: float, error: float, freedom: float) -> float:
    from scipy.special import stdtr

    if not error:
        return 0.0 if mean else 1.0
    return float(2 * stdtr(freedom, -abs(mean) / error))
