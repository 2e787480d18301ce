"""The performance matrix R and every continual-learning metric by its published definition.

Notation, in this file and everywhere else: T tasks in the order of learning; `R[i][j]` is the score
on task j (1..T) after learning task i; row 0 is the base model before any learning. Higher is
better. Libraries use one name for different formulas, so each formula has its own name here.
A metric that needs an unmeasured cell is NaN, never a guess. A method under `@metric` is in every
report, tracker and list of metrics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from cl_graft.errors import CLGraftError

FloatArray = npt.NDArray[np.float64]
Rows = FloatArray | Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Metric:
    """A number that a performance matrix comes to, in the unit of its scores.

    source: who defined it. better: whether `higher` or `lower` is. of: matrix -> number; its docstring begins with
    name and formula. joint: `of` also takes the scores of a model that learned all tasks at once.
    """

    name: str
    source: str
    better: str
    of: Callable[..., float]
    joint: bool = False

    @property
    def help(self) -> str:
        """The formula, as the first line of its function's docstring has it."""
        return (self.of.__doc__ or "").partition("\n")[0]


METRICS: dict[str, Metric] = {}  # what reports, trackers and the documentation show, in order
Of = TypeVar("Of", bound=Callable[..., float])


def metric(source: str, better: str = "higher", joint: bool = False) -> Callable[[Of], Of]:
    """Put a method of PerformanceMatrix among the METRICS, under its own name."""

    def put(of: Of) -> Of:
        METRICS[of.__name__] = Metric(of.__name__, source, better, of, joint)
        return of

    return put


class MatrixError(CLGraftError, ValueError):
    """A performance matrix, or a number to put into one, that cannot be right."""


@dataclass(frozen=True, init=False, eq=False)
class PerformanceMatrix:
    """Scores of a stream, with the number of examples and the standard error behind each.

    scores: float64 (T+1, T), read-only; NaN where a cell was not measured; row 0 is the base model.
    tasks: the T names, in the order of learning, which is also the order of the columns.
    n: float64 (T+1, T) or None, examples behind each score.
    stderr: float64 (T+1, T) or None, standard error of each score, in the score's own unit.

    The arguments may be nested lists, in which None means unmeasured; they are copied.
    Raises MatrixError for a wrong shape, an infinite value, a negative n or stderr, and for task
    names that are empty or repeated.
    """

    scores: FloatArray
    tasks: tuple[str, ...]
    n: FloatArray | None
    stderr: FloatArray | None

    def __init__(
        self, scores: Rows, tasks: Sequence[str], n: Rows | None = None, stderr: Rows | None = None
    ):
        names = _task_names(tasks)
        object.__setattr__(self, "tasks", names)
        object.__setattr__(self, "scores", _grid("scores", scores, len(names)))
        object.__setattr__(self, "n", None if n is None else _grid("n", n, len(names), 0.0))
        se = None if stderr is None else _grid("stderr", stderr, len(names), 0.0)
        object.__setattr__(self, "stderr", se)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PerformanceMatrix):
            return NotImplemented
        return self.to_dict() == other.to_dict()  # null compares equal to null, NaN would not

    # --- rows and diagonals -----------------------------------------------------------------

    def base(self) -> list[float]:
        """`R[0][j]`: the T scores of the base model."""
        return [float(x) for x in self.scores[0]]

    def learned(self) -> list[float]:
        """`R[j][j]`: each task's score at the moment it has just been learned."""
        return [float(x) for x in np.diagonal(self.scores, offset=-1)]

    def final(self) -> list[float]:
        """`R[T][j]`: the T scores at the end of the stream."""
        return [float(x) for x in self.scores[-1]]

    # --- metrics ----------------------------------------------------------------------------

    @metric("ACC in Lopez-Paz and Ranzato 2017; OP in TRACE (arXiv 2310.06762)")
    def op(self) -> float:
        """Overall performance: `(1/T) sum_j R[T][j]`.

        ACC in Lopez-Paz and Ranzato, Gradient Episodic Memory, NeurIPS 2017, section 2; average
        accuracy in Chaudhry et al., Riemannian Walk, ECCV 2018; OP in TRACE (arXiv 2310.06762).
        """
        return _mean(self.final())

    def ap(self) -> float:
        """Average performance: the same number as `op`, by the name that SAPT and GainLoRA use."""
        return self.op()

    @metric("MAA in MCITlib (arXiv 2508.07307)")
    def average_over_stages(self) -> float:
        """`(1/T) sum_k (1/k) sum_{j<=k} R[k][j]`: mean over stages of the mean over tasks seen.

        "Avg" in EasyCL, MAA in MCITlib (arXiv 2508.07307).
        """
        return _mean([_mean(self.scores[k, :k]) for k in range(1, len(self.tasks) + 1)])

    @metric("Lopez-Paz and Ranzato 2017")
    def bwt(self) -> float:
        """Backward transfer: `(1/(T-1)) sum_{j<T} (R[T][j] - R[j][j])`; NaN when T = 1.

        Lopez-Paz and Ranzato 2017, section 2. Negative means forgetting.
        """
        return _mean(np.subtract(self.final(), self.learned())[:-1])

    @metric("Lopez-Paz and Ranzato 2017; there of an untrained model, here of the base")
    def fwt(self, baseline: Sequence[float] | None = None) -> float:
        """Forward transfer: `(1/(T-1)) sum_{j>1} (R[j-1][j] - b_j)`; NaN when T = 1.

        Lopez-Paz and Ranzato 2017, section 2, where b_j is the score of an untrained model on task
        j. `baseline` gives the T values of b; left out, b is row 0, the base model.
        """
        b = self.base() if baseline is None else _per_task("baseline", baseline, self.tasks)
        just_before = np.diagonal(self.scores)  # R[j-1][j], j = 1..T
        return _mean((just_before - b)[1:])

    @metric("Chaudhry et al. 2018", better="lower")
    def fm(self) -> float:
        """Forgetting: `(1/(T-1)) sum_{j<T} (max_{l in 1..T-1} R[l][j] - R[T][j])`; NaN when T = 1.

        Chaudhry et al. 2018, section 3. The last row takes no part in the maximum, so a task that
        ends better than it ever was makes this negative. The maximum skips unmeasured cells.
        """
        return _mean((_best(self.scores[1:-1]) - self.final())[:-1])

    @metric("Avalanche's StreamForgetting", better="lower")
    def avalanche_forgetting(self) -> float:
        """First minus last: `(1/(T-1)) sum_{j<T} (R[j][j] - R[T][j])`; NaN when T = 1.

        StreamForgetting of the Avalanche library after the last experience: it takes the first
        score after learning where Chaudhry takes the best one, so it is exactly `-bwt()`.
        """
        return 0.0 - self.bwt()  # -bwt() would print -0.0 where nothing was forgotten

    @metric("Mammoth", better="lower")
    def max_forgetting_all_rows(self) -> float:
        """`(1/(T-1)) sum_{j<T} (max_{l in 1..T} R[l][j] - R[T][j])`; NaN when T = 1.

        What the Mammoth library calls forgetting: the last row takes part in the maximum, so it is
        never negative. Mammoth counts an unmeasured cell as 0; the maximum skips it here.
        """
        return _mean((_best(self.scores[1:]) - self.final())[:-1])

    @metric("MCITlib (arXiv 2508.07307)")
    def mft(self) -> float:
        """Mean fine-tuned score: `(1/T) sum_j R[j][j]`."""
        return _mean(self.learned())

    @metric("MCITlib (arXiv 2508.07307)")
    def mfn(self) -> float:
        """Mean final score: `(1/T) sum_j R[T][j]`, equal to `op`."""
        return self.op()

    @metric("Chaudhry et al. 2018", better="lower", joint=True)
    def intransigence(self, joint: Sequence[float]) -> float:
        """Inability to learn: `(1/T) sum_j (joint_j - R[j][j])`.

        Chaudhry et al. 2018, section 3, define it for each task against a model trained on the data
        of all tasks so far; this is the mean over the tasks. `joint`: that model's T scores.
        """
        return _mean(np.subtract(_per_task("joint", joint, self.tasks), self.learned()))

    def metrics(self, joint: Sequence[float] | None = None) -> dict[str, float]:
        """Every metric under its own name; intransigence only where the `joint` scores are given.

        The values are floats, NaN where undefined.
        """
        given = () if joint is None else (joint,)
        return {
            name: metric.of(self, *(given if metric.joint else ()))
            for name, metric in METRICS.items()
            if given or not metric.joint
        }

    # --- showing ----------------------------------------------------------------------------

    def _repr_html_(self) -> str:
        """A table for a notebook: a row an experience, per cent on one scale of blue, what was just learned framed."""
        head = "".join(f"<th>{escape(task)}</th>" for task in self.tasks)
        rows = "".join(
            f"<tr><th style='text-align:left'>{escape(name)}</th>"
            + "".join(self._datum(i, j) for j in range(len(self.tasks)))
            + "</tr>"
            for i, name in enumerate(["base", *(f"after {task}" for task in self.tasks)])
        )
        found = {
            name.upper(): value
            for name in ("op", "bwt", "fm")
            if (value := getattr(self, name)()) == value
        }
        note = ", ".join(f"{name} {100 * value:.1f}" for name, value in found.items())
        return (
            f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody>"
            f"<caption style='caption-side:bottom;text-align:left'>Per cent. {note}</caption></table>"
        )

    def _datum(self, i: int, j: int) -> str:
        """A cell of the table; its blue is see-through, so that it suits a dark notebook, too."""
        score = self.scores[i, j]
        if math.isnan(score):
            return "<td style='text-align:right'>–</td>"
        shade = f"background:rgba(0,114,178,{0.6 * min(max(score, 0.0), 1.0):.2f})"
        frame = ";outline:2px solid #D55E00;outline-offset:-2px" if i == j + 1 else ""
        known = self.stderr is not None and not math.isnan(self.stderr[i, j])
        error = f" <small>± {100 * self.stderr[i, j]:.1f}</small>" if known else ""  # type: ignore[index]
        return f"<td style='text-align:right;{shade}{frame}'>{100 * score:.1f}{error}</td>"

    # --- storage ----------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain lists for JSON; null where a cell was not measured."""
        return {
            "tasks": list(self.tasks),
            "scores": _plain(self.scores),
            "n": None if self.n is None else _plain(self.n, int),
            "stderr": None if self.stderr is None else _plain(self.stderr),
        }


def mean_stderr(values: Sequence[float] | FloatArray) -> float:
    """Standard error of the mean of `values`, (n,): sample deviation (n - 1) over `sqrt(n)`.

    NaN for fewer than two values.
    """
    x = np.asarray(values, dtype=np.float64)
    return float(x.std(ddof=1) / math.sqrt(x.size)) if x.size > 1 else math.nan


def _mean(values: Sequence[float] | FloatArray) -> float:
    return float(np.mean(values)) if len(values) else math.nan


def _best(rows: FloatArray) -> FloatArray:
    """(k, T) -> (T,): the maximum of each column's measured cells, NaN where there is none."""
    best = np.where(np.isnan(rows), -np.inf, rows).max(axis=0, initial=-np.inf)
    return np.where(np.isinf(best), np.nan, best)


def _plain(grid: FloatArray, kind: type[float] = float) -> list[list[float | None]]:
    return [[None if math.isnan(x) else kind(x) for x in row] for row in grid.tolist()]


def _task_names(tasks: Sequence[str]) -> tuple[str, ...]:
    if isinstance(tasks, str) or not tasks or not all(isinstance(t, str) and t for t in tasks):
        raise MatrixError(
            f"the tasks of a performance matrix are {tasks!r}; give a list of one name or more."
        )
    repeated = sorted({t for t in tasks if list(tasks).count(t) > 1})
    if repeated:
        raise MatrixError(
            f"the tasks of a performance matrix repeat {', '.join(repeated)}; give each task a "
            "name of its own."
        )
    return tuple(tasks)


def _grid(what: str, rows: Rows, t: int, least: float = -math.inf) -> FloatArray:
    """A read-only float64 copy, (t+1, t), of finite or NaN values that are `least` or more."""
    try:
        grid = np.array(rows, dtype=np.float64)
    except (TypeError, ValueError):
        raise MatrixError(
            f"the {what} of a performance matrix are not {t + 1} equally long rows of numbers; "
            "use null (None) for a cell that was not measured."
        ) from None
    if grid.shape != (t + 1, t):
        raise MatrixError(
            f"the {what} of a performance matrix have shape {grid.shape} where {t} tasks need "
            f"{(t + 1, t)}; give one row for the base model and one after each task."
        )
    wrong = np.isinf(grid) | (grid < least)
    if wrong.any():
        i, j = (int(k) for k in np.argwhere(wrong)[0])
        raise MatrixError(
            f"the {what} of a performance matrix hold {grid[i, j]} in row {i}, column {j}; "
            "give a possible finite number, or null (None) where nothing was measured."
        )
    grid.setflags(write=False)
    return grid


def _per_task(what: str, values: Sequence[float], tasks: Sequence[str]) -> FloatArray:
    vector = np.array(values, dtype=np.float64)
    if vector.shape != (len(tasks),):
        raise MatrixError(
            f"{what} has shape {vector.shape} where {len(tasks)} tasks need ({len(tasks)},); "
            f"give one score for each of {', '.join(tasks)}."
        )
    return vector
