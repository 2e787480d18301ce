"""Scores of tasks worked by hand: plain means, and means of the means of several benchmarks."""

from __future__ import annotations

import math

import pytest

from cl_graft.errors import CLGraftError
from cl_graft.evaluation.scorers import Scored
from cl_graft.evaluation.scores import by_metric, cells
from cl_graft.task import Example, Task


def outcomes(*scores: float) -> list[Scored]:
    return [Scored(score, "") for score in scores]


def task(name: str, suites: str) -> Task:
    return Task(name, (), [Example("p", "c", suite=suite) for suite in suites], "exact")


def test_one_suite_is_the_plain_mean() -> None:
    """1, 0, 1, 1: mean 3/4, sample variance 1/4, error sqrt(1/4 / 4) = 1/4."""
    for suite in ("", "A"):
        found = cells({"exact": outcomes(1, 0, 1, 1)}, [suite] * 4)
        assert found == {"score": {"value": 0.75, "n": 4, "stderr": 0.25}}


def test_several_suites_are_scored_by_the_mean_of_their_means() -> None:
    """A: 1, 0, 1, 1 (3/4 +- 1/4); B: 0, 1 (1/2 +- 1/2). Mean 5/8, not 4/6; error sqrt(1/16 + 1/4) / 2."""
    found = cells({"exact": outcomes(1, 0, 0, 1, 1, 1)}, list("AABAAB"))
    assert found["A"] == {"value": 0.75, "n": 4, "stderr": 0.25}
    assert found["B"] == {"value": 0.5, "n": 2, "stderr": 0.5}
    assert found["score"]["value"] == 0.625 and found["score"]["n"] == 6
    assert found["score"]["stderr"] == pytest.approx(math.sqrt(5 / 16) / 2)
    assert list(found) == ["score", "A", "B"]


def test_an_error_that_is_unknown_stays_unknown() -> None:
    found = cells({"exact": outcomes(1, 0, 1)}, list("AAB"))
    assert found["B"] == {"value": 1.0, "n": 1, "stderr": None}
    assert found["score"]["stderr"] is None and found["score"]["value"] == 0.75


def test_further_metrics_have_the_mean_of_means_but_no_suites_of_their_own() -> None:
    metrics = {"exact": outcomes(1, 0, 0), "bits": outcomes(-1, -3, -6)}
    found = cells(metrics, list("AAB"))
    assert found["bits"]["value"] == -4.0
    assert set(found) == {"score", "A", "B", "bits"} and found["A"]["value"] == 0.5


def test_tasks_with_and_without_suites_stand_side_by_side() -> None:
    tasks = [task("math", "AB"), Task("code", (), [Example("p", "c")], "exact")]
    found = by_metric({"math": {"exact": outcomes(1, 0)}, "code": {"exact": outcomes(1)}}, tasks)
    assert {k: set(v) for k, v in found.items()} == {
        "score": {"math", "code"},
        "A": {"math"},
        "B": {"math"},
    }


def test_an_outcome_too_few_or_too_many_is_no_score() -> None:
    for scores in ((1,), (1, 1, 1)):
        with pytest.raises(ValueError):
            cells({"exact": outcomes(*scores)}, ["", ""])


def test_suites_that_would_be_mistaken_are_refused() -> None:
    with pytest.raises(CLGraftError, match="others without"):
        Task("t", (), [Example("p", "c", suite="A"), Example("p", "c")], "exact")
    with pytest.raises(CLGraftError, match="suite named 'bits', as one of its scorers"):
        Task("t", (), [Example("p", "c", suite="bits")], "exact", also=("bits",))
