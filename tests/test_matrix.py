"""The performance matrix: every metric against hand-worked numbers and the formula as a loop."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_graft.errors import CLGraftError
from cl_graft.matrix import MatrixError, PerformanceMatrix, mean_stderr

NAN = math.nan

# Column a: learned at .9, falls to .6, ends at .7. Column b: .2 just before its turn, learned at
# .8, ends at .5. Column c: .3 just before its turn, learned (and ends) at .6.
HAND = PerformanceMatrix(
    [
        [0.1, 0.0, 0.2],
        [0.9, 0.2, 0.1],
        [0.6, 0.8, 0.3],
        [0.7, 0.5, 0.6],
    ],
    tasks=["a", "b", "c"],
)


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("op", (0.7 + 0.5 + 0.6) / 3),
        ("average_over_stages", (0.9 + (0.6 + 0.8) / 2 + 0.6) / 3),
        ("bwt", ((0.7 - 0.9) + (0.5 - 0.8)) / 2),
        ("fwt", ((0.2 - 0.0) + (0.3 - 0.2)) / 2),
        ("fm", ((0.9 - 0.7) + (0.8 - 0.5)) / 2),
        ("avalanche_forgetting", ((0.9 - 0.7) + (0.8 - 0.5)) / 2),
        ("max_forgetting_all_rows", ((0.9 - 0.7) + (0.8 - 0.5)) / 2),
        ("mft", (0.9 + 0.8 + 0.6) / 3),
        ("mfn", (0.7 + 0.5 + 0.6) / 3),
    ],
)
def test_metrics_of_a_matrix_worked_by_hand(metric: str, expected: float) -> None:
    assert HAND.metrics()[metric] == pytest.approx(expected)
    assert getattr(HAND, metric)() == pytest.approx(expected)


def test_ap_is_another_name_of_op() -> None:
    assert HAND.ap() == HAND.op()


def test_rows_and_diagonal() -> None:
    assert HAND.base() == [0.1, 0.0, 0.2]
    assert HAND.learned() == [0.9, 0.8, 0.6]
    assert HAND.final() == [0.7, 0.5, 0.6]


def test_forward_transfer_against_a_given_baseline() -> None:
    assert HAND.fwt([0.25, 0.25, 0.25]) == pytest.approx(((0.2 - 0.25) + (0.3 - 0.25)) / 2)


def test_intransigence_appears_only_with_the_joint_scores() -> None:
    assert "intransigence" not in HAND.metrics()
    joint = [0.95, 0.9, 0.5]
    expected = ((0.95 - 0.9) + (0.9 - 0.8) + (0.5 - 0.6)) / 3
    assert HAND.metrics(joint)["intransigence"] == pytest.approx(expected)


def test_the_definitions_of_forgetting_differ_where_a_task_improves_later() -> None:
    """Task a: .5 learned, .7 after b, .9 at the end. Chaudhry's maximum leaves the last row out."""
    m = PerformanceMatrix(
        [[0, 0, 0], [0.5, 0, 0], [0.7, 0.6, 0], [0.9, 0.4, 0.8]], tasks=["a", "b", "c"]
    )
    assert m.fm() == pytest.approx(((0.7 - 0.9) + (0.6 - 0.4)) / 2)
    assert m.avalanche_forgetting() == pytest.approx(((0.5 - 0.9) + (0.6 - 0.4)) / 2)
    assert m.max_forgetting_all_rows() == pytest.approx(((0.9 - 0.9) + (0.6 - 0.4)) / 2)


def test_forgetting_is_negative_where_every_task_ends_at_its_best() -> None:
    m = PerformanceMatrix([[0, 0], [0.5, 0], [0.8, 0.6]], tasks=["a", "b"])
    assert m.fm() == pytest.approx(-0.3)
    assert m.max_forgetting_all_rows() == 0.0


def test_the_base_model_never_counts_as_a_best_score() -> None:
    m = PerformanceMatrix([[0.9, 0], [0.5, 0], [0.4, 0.6]], tasks=["a", "b"])
    assert m.fm() == pytest.approx(0.1)
    assert m.max_forgetting_all_rows() == pytest.approx(0.1)


def test_nothing_forgotten_is_plain_zero() -> None:
    m = PerformanceMatrix([[0, 0], [0.5, 0], [0.5, 0.6]], tasks=["a", "b"])
    assert str(m.avalanche_forgetting()) == str(m.fm()) == "0.0"


def test_one_task_has_no_transfer_and_no_forgetting() -> None:
    metrics = PerformanceMatrix([[0.2], [0.7]], tasks=["only"]).metrics()
    undefined = {"bwt", "fwt", "fm", "avalanche_forgetting", "max_forgetting_all_rows"}
    assert {name for name, value in metrics.items() if math.isnan(value)} == undefined
    assert metrics["op"] == metrics["mft"] == metrics["average_over_stages"] == 0.7


def test_the_maximum_skips_unmeasured_cells() -> None:
    m = PerformanceMatrix(
        [[None, None, None], [0.5, None, None], [None, 0.6, None], [0.2, 0.5, 0.8]],
        tasks=["a", "b", "c"],
    )
    assert m.fm() == pytest.approx(((0.5 - 0.2) + (0.6 - 0.5)) / 2)
    assert m.bwt() == pytest.approx(((0.2 - 0.5) + (0.5 - 0.6)) / 2)
    assert math.isnan(m.fwt())  # no row 0, no scores before learning
    assert math.isnan(m.average_over_stages())  # R[2][1] is missing


def test_an_unmeasured_final_score_makes_the_metrics_that_need_it_nan() -> None:
    m = PerformanceMatrix([[0.1, 0.1], [0.5, 0.2], [None, 0.6]], tasks=["a", "b"])
    for name in ("op", "bwt", "fm", "avalanche_forgetting", "max_forgetting_all_rows", "mfn"):
        assert math.isnan(m.metrics()[name]), name
    assert m.mft() == pytest.approx(0.55)
    assert m.fwt() == pytest.approx(0.1)


def test_a_task_never_measured_before_the_end_has_no_forgetting() -> None:
    m = PerformanceMatrix([[None, 0], [None, 0], [0.4, 0.6]], tasks=["a", "b"])
    assert math.isnan(m.fm())
    assert m.max_forgetting_all_rows() == 0.0


# --- against loops written straight from the formulas, indices as printed in the papers --------


def loop_fm(r: Callable[[int, int], float], t: int) -> float:
    total = 0.0
    for j in range(1, t):
        seen = [r(i, j) for i in range(1, t) if not math.isnan(r(i, j))]
        total += (max(seen) if seen else NAN) - r(t, j)
    return total / (t - 1)


def loop_mammoth(r: Callable[[int, int], float], t: int) -> float:
    total = 0.0
    for j in range(1, t):
        seen = [r(i, j) for i in range(1, t + 1) if not math.isnan(r(i, j))]
        total += (max(seen) if seen else NAN) - r(t, j)
    return total / (t - 1)


LOOPS: dict[str, Callable[[Callable[[int, int], float], int], float]] = {
    "op": lambda r, t: sum(r(t, j) for j in range(1, t + 1)) / t,
    "average_over_stages": lambda r, t: (
        sum(sum(r(k, j) for j in range(1, k + 1)) / k for k in range(1, t + 1)) / t
    ),
    "bwt": lambda r, t: sum(r(t, j) - r(j, j) for j in range(1, t)) / (t - 1),
    "fwt": lambda r, t: sum(r(j - 1, j) - r(0, j) for j in range(2, t + 1)) / (t - 1),
    "fm": loop_fm,
    "avalanche_forgetting": lambda r, t: sum(r(j, j) - r(t, j) for j in range(1, t)) / (t - 1),
    "max_forgetting_all_rows": loop_mammoth,
    "mft": lambda r, t: sum(r(j, j) for j in range(1, t + 1)) / t,
    "mfn": lambda r, t: sum(r(t, j) for j in range(1, t + 1)) / t,
}


@st.composite
def grids(draw: st.DrawFn) -> list[list[float | None]]:
    t = draw(st.integers(2, 6))
    cell = st.one_of(st.floats(-2.0, 2.0, width=32), st.just(None))
    if draw(st.booleans()):  # fully measured half of the time, or nearly all metrics are NaN
        cell = st.floats(0.0, 1.0, width=32)
    return draw(st.lists(st.lists(cell, min_size=t, max_size=t), min_size=t + 1, max_size=t + 1))


@given(grids())
def test_metrics_agree_with_the_formulas(rows: list[list[float | None]]) -> None:
    t = len(rows[0])

    def r(i: int, j: int) -> float:
        value = rows[i][j - 1]
        return NAN if value is None else value

    metrics = PerformanceMatrix(rows, tasks=[f"t{j}" for j in range(t)]).metrics()
    assert set(metrics) == set(LOOPS)
    for name, loop in LOOPS.items():
        assert metrics[name] == pytest.approx(loop(r, t), abs=1e-9, nan_ok=True), name
    if not math.isnan(metrics["max_forgetting_all_rows"]):
        assert metrics["max_forgetting_all_rows"] >= 0.0


# --- construction, storage --------------------------------------------------------------------


@given(grids())
def test_a_matrix_survives_json(rows: list[list[float | None]]) -> None:
    tasks = [f"t{j}" for j in range(len(rows[0]))]
    n = [[None if x is None else 40 for x in row] for row in rows]
    before = PerformanceMatrix(rows, tasks=tasks, n=n, stderr=np.full((len(rows), len(tasks)), 0.1))
    text = json.dumps(before.to_dict(), allow_nan=False)
    after = PerformanceMatrix(**json.loads(text))
    assert after == before
    assert after.to_dict()["scores"] == rows
    assert after.to_dict()["n"] == n


def test_matrices_differ_by_any_of_their_parts() -> None:
    rows = [[0.1], [0.2]]
    base = PerformanceMatrix(rows, tasks=["a"])
    assert base == PerformanceMatrix(np.array(rows), tasks=("a",))
    assert base != PerformanceMatrix(rows, tasks=["b"])
    assert base != PerformanceMatrix([[0.1], [0.3]], tasks=["a"])
    assert base != PerformanceMatrix(rows, tasks=["a"], n=[[5], [5]])
    assert base != "a matrix"


def test_input_is_copied_and_the_copy_is_read_only() -> None:
    source = np.zeros((3, 2))
    m = PerformanceMatrix(source, tasks=["a", "b"])
    source[:] = 1.0
    assert m.op() == 0.0
    with pytest.raises(ValueError, match="read-only"):
        m.scores[0, 0] = 1.0
    with pytest.raises(AttributeError):
        m.tasks = ("x", "y")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scores": [[0.1, 0.2]], "tasks": ["a", "b"]}, r"shape \(1, 2\).*need \(3, 2\)"),
        ({"scores": [[0.1, 0.2], [0.1]], "tasks": ["a", "b"]}, "equally long rows"),
        ({"scores": [["high"], ["low"]], "tasks": ["a"]}, "rows of numbers"),
        ({"scores": [[0.1], [math.inf]], "tasks": ["a"]}, "hold inf in row 1, column 0"),
        ({"scores": [[0, 0], [0, 0], [0, 0]], "tasks": ["a", "a"]}, "repeat a"),
        ({"scores": [[0], [0]], "tasks": [""]}, "one name or more"),
        ({"scores": [[]], "tasks": []}, "one name or more"),
        ({"scores": [[0], [0]], "tasks": "a"}, "one name or more"),
        ({"scores": [[0], [0]], "tasks": ["a"], "n": [[1]]}, "the n of .* shape"),
        ({"scores": [[0], [0]], "tasks": ["a"], "n": [[1], [-1]]}, "the n of .* hold -1.0"),
        ({"scores": [[0], [0]], "tasks": ["a"], "stderr": [[-0.1], [0]]}, "stderr .* row 0"),
    ],
)
def test_impossible_matrices_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(MatrixError, match=message) as caught:
        PerformanceMatrix(**arguments)
    assert isinstance(caught.value, CLGraftError)
    assert isinstance(caught.value, ValueError)


def test_a_baseline_or_joint_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(MatrixError, match="baseline has shape"):
        HAND.fwt([0.1])
    with pytest.raises(MatrixError, match="joint has shape"):
        HAND.intransigence([0.1, 0.2])


# --- standard errors --------------------------------------------------------------------------


def test_mean_stderr_by_hand() -> None:
    # mean 2, squared deviations 1 + 0 + 1, sample variance 1, over sqrt(3)
    assert mean_stderr([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert math.isnan(mean_stderr([1.0]))
    assert math.isnan(mean_stderr([]))


@given(st.lists(st.booleans(), min_size=2, max_size=200))
def test_mean_stderr_of_zeros_and_ones_is_the_binomial_with_n_minus_1(right: list[bool]) -> None:
    n, mean = len(right), sum(right) / len(right)
    expected = math.sqrt(mean * (1 - mean) / (n - 1))  # of a binomial share, with n - 1 for n
    assert mean_stderr([float(x) for x in right]) == pytest.approx(expected, abs=1e-12)
