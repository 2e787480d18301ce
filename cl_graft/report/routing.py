"""What test prompts were taken for where their task is inferred: how often rightly, and what for what."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cl_graft.matrix import FloatArray
from cl_graft.report.aggregate import Line, groups, lines_of
from cl_graft.report.protocols import WHO, Cell
from cl_graft.report.table import UNMEASURED, Table, show

BASE, GENERAL = "base model", "general"  # names of a column and a row
ACCURACY_NOTE = (
    "Per cent of the test examples of the tasks seen so far that were taken for the task they are of, the mean over "
    "seeds. Prompts of general ability have no right answer and do not count. ± is the standard error over seeds, for "
    "these test examples alone."
)
CONFUSION_NOTE = (
    "A row for the task that prompts are of, a column for what they were taken for after the last task learned: test "
    "examples of all seeds together, and their share of the row. Prompts of general ability have no right answer."
)


@dataclass(frozen=True)
class Confusion:
    """What prompts were taken for. counts: int64 (rows, columns), test examples; a row for what `of` names, a column
    for what `taken_for` does: the tasks in their order, then general ability and the base model where any was."""

    name: str
    of: tuple[str, ...]
    taken_for: tuple[str, ...]
    counts: npt.NDArray[np.int64]

    @property
    def shares(self) -> FloatArray:
        """The counts as shares of their row, float64 in 0..1; NaN in a row without prompts."""
        with np.errstate(invalid="ignore"):
            return self.counts / self.counts.sum(axis=1, keepdims=True)

    def rows(self) -> list[tuple[str, list[tuple[int, float]]]]:
        """Each row's name, with count and share of every column."""
        pairs = zip(self.of, self.counts.tolist(), self.shares.tolist(), strict=True)
        return [(of, list(zip(n, share, strict=True))) for of, n, share in pairs]


def inferred(cell: Cell) -> bool:
    """Whether a router inferred the tasks of this cell's prompts, after one task at least."""
    return any(x is not None for x in cell.get("routing_accuracy") or [])


def routed(cells: Sequence[Cell]) -> list[Line]:
    """The lines of one group whose tasks a router inferred. Raises ReportError as `lines_of` does."""
    return [line for line in lines_of(cells) if any(map(inferred, line.cells))]


def confusions(lines: Sequence[Line]) -> list[Confusion]:
    """Confusion matrices of the lines after the last task of complete cells; all with the same rows and columns."""
    if not lines:
        return []
    tasks = lines[0].tasks
    last = [[c["routing"][-1] for c in line.cells if inferred(c)] for line in lines]
    told = [(name, taken) for those in last for counts in those for name, taken in counts.items()]
    of = tasks + ((GENERAL,) if any(n not in tasks and taken for n, taken in told) else ())
    taken_for = tasks + ((BASE,) if any("" in taken for _, taken in told) else ())
    matrices = []
    for line, those in zip(lines, last, strict=True):
        counts = np.zeros((len(of), len(taken_for)), np.int64)
        for name, taken in ((n, t) for counted in those for n, t in counted.items()):
            row = tasks.index(name) if name in tasks else len(tasks)
            for task, count in taken.items():
                counts[row, tasks.index(task) if task else len(tasks)] += count
        matrices.append(Confusion(line.name, of, taken_for, counts))
    return matrices


def accuracy(cells: Sequence[Cell]) -> list[Table]:
    """A table for each group in which tasks were inferred: a row a label, a column for each task learned."""
    tables = []
    for title, members in groups(cells).items():
        if lines := routed(members):
            columns = (*WHO, *(f"after {task}" for task in lines[0].tasks))
            rows, exact = (
                tuple((*line.who, *told(line, spec)) for line in lines) for spec in (".1f", ".4f")
            )
            parts = tuple(line.part for line in lines)
            tables.append(Table(f"Routing: {title}", columns, rows, ACCURACY_NOTE, exact, parts))
    return tables


def told(line: Line, spec: str = ".1f") -> list[str]:
    """Routing accuracy after each task, in per cent, with its standard error over seeds."""
    return [show(100.0 * mean, spec, 100.0 * se) for mean, se in line.routing()]


def confusion_tables(cells: Sequence[Cell]) -> list[Table]:
    """A table for each label of each group whose tasks were inferred: counts and per cent."""
    tables = []
    for title, members in groups(cells).items():
        for confusion in confusions(routed(members)):
            rows = tuple((of, *(_counted(*pair) for pair in row)) for of, row in confusion.rows())
            columns = ("Prompts of", *confusion.taken_for)
            tables.append(
                Table(f"Routing of {title}: {confusion.name}", columns, rows, CONFUSION_NOTE)
            )
    return tables


def confusion_csv(cells: Sequence[Cell]) -> str:
    """The confusions of one group for a program: a row for each label, task of prompts, and what they were."""
    rows = tuple(
        (confusion.name, of, name, str(n), show(100.0 * share, ".4f"))
        for confusion in confusions(routed(cells))
        for of, row in confusion.rows()
        for name, (n, share) in zip(confusion.taken_for, row, strict=True)
    )
    columns = ("Strategy", "Prompts of", "Taken for", "Examples", "Per cent")
    return Table("", columns, rows).csv()


def _counted(count: int, share: float) -> str:
    return UNMEASURED if math.isnan(share) else f"{count} ({show(100.0 * share, '.1f')} %)"
