"""Tables of a sweep: who ranks where, and what each strategy forgot.

The input is a list of cells, the objects that `cl-graft report DIR --json` prints. Cells of one
scenario, model and budget form a group; within it, the complete cells of a label are averaged over
seeds, and an incomplete cell stands alone under a name that says so. Scores are shares of 1 in the
cells and per cent in the tables. A mean over seeds of which one is unmeasured is unmeasured.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cl_graft.errors import CLGraftError
from cl_graft.matrix import FloatArray, PerformanceMatrix, mean_stderr

if TYPE_CHECKING:
    import rich.table

Cell = Mapping[str, Any]
Estimate = tuple[float, float]  # a mean and its standard error; either may be NaN

UNMEASURED = "–"
NOTE = (
    "Scores, OP, BWT, FM and the change of general ability in per cent; ± is the standard error "
    "over seeds, or over test examples where there is one seed. Storage is the largest pack of a "
    "task in per cent of the base model in bf16; total bytes are those of all packs."
)


class ReportError(CLGraftError, ValueError):
    """Cells of which no honest table can be made."""


@dataclass(frozen=True)
class Table:
    """A titled grid of strings; every row has one string per column."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """A heading, a pipe table with its numbers to the right, and the note."""
        rule = "|:--" + "|--:" * (len(self.columns) - 1) + "|"
        head, *body = (
            "| " + " | ".join(map(_cell, row)) + " |" for row in (self.columns, *self.rows)
        )
        return "\n".join([f"### {self.title}", "", head, rule, *body, "", self.note]).rstrip()

    def csv(self) -> str:
        """The grid for a program: "mean ± s.e." becomes two columns, a number has no thousands
        separator, and an unmeasured value is empty."""
        split = [any(" ± " in row[i] for row in self.rows) for i in range(len(self.columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        for i, row in enumerate((self.columns, *self.rows)):
            fields: list[str] = []
            for cell, two in zip(row, split, strict=True):
                mean, _, se = cell.partition(" ± ")
                fields += [_machine(mean), se or ("" if i else f"{cell} s.e.")][: 1 + two]
            writer.writerow(fields)
        return text.getvalue()

    def rich(self) -> rich.table.Table:
        """The grid for a terminal."""
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable(title=Text(self.title), caption=Text(self.note) if self.note else None)
        for i, column in enumerate(self.columns):
            grid.add_column(Text(column), justify="right" if i else "left")
        for row in self.rows:
            grid.add_row(*map(Text, row))  # Text: brackets in a label are not markup
        return grid


@dataclass(frozen=True)
class Series:
    """One line of a report: a label's complete cells over seeds, or one incomplete cell.

    mean, stderr: float64 (T+1, T), scores as shares of 1; row 0 is the base model. stderr is over
    seeds where there are several, else the cell's own, over test examples.
    """

    name: str
    strategy: str
    complete: bool
    tasks: tuple[str, ...]
    cells: tuple[Cell, ...]
    mean: FloatArray
    stderr: FloatArray

    def over_seeds(self, value: Callable[[Cell], float]) -> Estimate:
        """Mean and standard error over the cells of one number per cell."""
        values = [value(cell) for cell in self.cells]
        return float(np.mean(values)), mean_stderr(values)

    def metric(self, key: str) -> Estimate:
        """A metric of the cells as a share of 1; unmeasured for an incomplete cell.

        OP of one seed takes its standard error from the test examples of its tasks, which are
        independent; the differences behind the other metrics are paired, so theirs is unknown.
        """
        if not self.complete:
            return math.nan, math.nan
        mean, se = self.over_seeds(lambda cell: _number(cell["metrics"].get(key)))
        if key == "op" and len(self.cells) == 1:
            se = math.sqrt(float(np.sum(self.stderr[-1] ** 2))) / len(self.tasks)
        return mean, se

    def storage(self) -> float:
        """Bytes of the largest pack of a task, in per cent of the base model's bytes."""
        share = self.over_seeds(lambda c: max(_packs(c), default=math.nan) / c["base_bytes"])
        return 100.0 * share[0]


def groups(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """The cells of each scenario, model and budget under a title, in order of first appearance.

    One scenario learned in two orders is two groups, whose titles then name the order.
    """
    found: dict[tuple[str, tuple[str, ...]], list[Cell]] = {}
    for cell in cells:
        title = f"{cell['scenario']} · {cell['model']} · budget {cell['budget']}"
        found.setdefault((title, tuple(cell["tasks"])), []).append(cell)
    titles = [title for title, _ in found]
    return {
        title + (f" · {' → '.join(tasks)}" if titles.count(title) > 1 else ""): members
        for (title, tasks), members in found.items()
    }


def series(cells: Sequence[Cell]) -> list[Series]:
    """The cells of one group as series, in order of first appearance, the incomplete ones last.

    Raises ReportError unless the cells are of one group, each seed of a label once.
    """
    titles = list(groups(cells))
    if len(titles) != 1:
        raise ReportError(
            f"the cells are of {len(titles)} groups ({'; '.join(titles) or 'there are no cells'}); "
            "give those of one scenario, model, budget and order of tasks."
        )
    complete: dict[str, list[Cell]] = {}
    incomplete: dict[str, list[Cell]] = {}
    seen: set[tuple[str, Any]] = set()
    for cell in cells:
        label, seed, tasks = cell["label"], cell["seed"], len(cell["tasks"])
        if (label, seed) in seen:
            raise ReportError(
                f"seed {seed} of {label} occurs twice in {titles[0]}; "
                "report on folders that hold each cell once."
            )
        seen.add((label, seed))
        done = sum(any(score is not None for score in row) for row in cell["matrix"][1:])
        name = f"{label} (incomplete: seed {seed}, {done} of {tasks} tasks)"
        if cell["complete"]:
            complete.setdefault(label, []).append(cell)
        else:
            incomplete[name] = [cell]
    return [_series(name, members) for name, members in (complete | incomplete).items()]


def ranking(cells: Sequence[Cell]) -> list[Table]:
    """A table for each group: a row for each label, the best OP first, incomplete cells last."""
    tables = []
    for title, members in groups(cells).items():
        lines = sorted(
            series(members), key=lambda s: np.nan_to_num(-s.metric("op")[0], nan=math.inf)
        )
        lines.sort(key=lambda s: not s.complete)
        columns = ("Strategy", *lines[0].tasks, "OP", "BWT", "FM", "General Δ")
        columns += ("Storage %", "Total bytes", "Train s", "Seeds")
        rows = tuple(map(_ranking_row, lines))
        tables.append(Table(f"Ranking: {title}", columns, rows, NOTE))
    return tables


def matrices(cells: Sequence[Cell]) -> list[Table]:
    """The forgetting matrix of each label of each group: a row per stage, a column per task.

    General ability, where any cell of the group has it, is the last column. The other metrics that
    a cell recorded follow in tables of their own, in their own unit, with the error over seeds.
    """
    found = []
    for title, members in groups(cells).items():
        for line in series(members):
            columns, mean, se = ("Stage", *line.tasks), line.mean, line.stderr
            if any(not np.isnan(_general(cell)).all() for cell in members):
                general = _average([_general(cell) for cell in line.cells])
                mean, se = np.column_stack([mean, general[0]]), np.column_stack([se, general[1]])
                columns += ("General ability",)
            name, note = f"{title}: {line.name}", _not_measured_again(line)
            found.append(_matrix(name, columns, 100.0 * mean, 100.0 * se, ".1f", note))
            for metric in sorted({m for c in line.cells for m in c.get("extra_matrices") or {}}):
                mean, se = _average([_extra(cell, metric) for cell in line.cells])
                name = f"{title}: {line.name}, {metric}"
                found.append(_matrix(name, ("Stage", *line.tasks), mean, se, ".3f"))
    return found


def write_tables(cells: Sequence[Cell], folder: Path | str) -> list[Path]:
    """Writes the ranking and the matrices of each group as CSV and Markdown; returns the files.

    The matrices of a group share one file, in CSV with their title as the first column. A file
    appears whole or not at all.
    """
    written = []
    for slug, members in slugged(groups(cells)):
        (rank,), tables = ranking(members), matrices(members)
        columns = max((table.columns for table in tables), key=len)
        joined = [
            (table.title, *row, *[UNMEASURED] * (len(columns) - len(row)))
            for table in tables
            for row in table.rows
        ]
        for name, text in {
            "ranking.md": rank.markdown() + "\n",
            "ranking.csv": rank.csv(),
            "matrices.md": "\n\n".join(table.markdown() for table in tables) + "\n",
            "matrices.csv": Table("", ("Matrix", *columns), tuple(joined)).csv(),
        }.items():
            written.append(write_atomic(Path(folder) / f"{slug}-{name}", text.encode()))
    return written


def slugged(found: Mapping[str, list[Cell]]) -> Iterator[tuple[str, list[Cell]]]:
    """The groups, each with a file name of its own in place of its title."""
    taken: set[str] = set()
    for title, members in found.items():
        stem = re.sub(r"[^A-Za-z0-9.]+", "-", title.replace("%", "pct")).strip("-.")[:120]
        names = [stem, *(f"{stem}-{k}" for k in range(2, len(found) + 1))]
        slug = next(name for name in names if name.lower() not in taken)  # some disks fold case
        taken.add(slug.lower())
        yield slug, members


def write_atomic(path: Path, data: bytes) -> Path:
    """Writes a file beside its place and moves it there, so that no reader sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _series(name: str, cells: Sequence[Cell]) -> Series:
    first = cells[0]
    tasks = tuple(first["tasks"])
    read = [PerformanceMatrix(c["matrix"], tasks, stderr=c.get("stderr")) for c in cells]
    mean, stderr = _average([m.scores for m in read])
    if len(read) == 1 and read[0].stderr is not None:
        stderr = read[0].stderr
    return Series(name, first["strategy"], first["complete"], tasks, tuple(cells), mean, stderr)


def _average(grids: Sequence[FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Mean and standard error over seeds of arrays of one shape; the error of one seed is NaN."""
    stack = np.stack(grids)
    if len(stack) == 1:
        return stack[0], np.full_like(stack[0], np.nan)
    return stack.mean(axis=0), stack.std(axis=0, ddof=1) / math.sqrt(len(stack))


def _ranking_row(line: Series) -> tuple[str, ...]:
    drift = line.over_seeds(lambda cell: _general(cell)[-1] - _general(cell)[0])
    total = line.over_seeds(lambda cell: sum(_packs(cell)) if _packs(cell) else math.nan)
    train = line.over_seeds(lambda cell: _number((cell.get("seconds") or {}).get("train")))
    scores = list(zip(line.mean[-1], line.stderr[-1], [".1f"] * len(line.tasks), strict=True))
    for key, spec in (("op", ".1f"), ("bwt", "+.1f"), ("fm", ".1f")):
        scores.append((*line.metric(key), spec))
    return (
        line.name,
        *(_show(100.0 * mean, spec, 100.0 * se) for mean, se, spec in [*scores, (*drift, "+.1f")]),
        _show(line.storage(), ".2f"),
        _show(total[0], ",.0f"),
        _show(train[0], ",.1f"),
        str(len(line.cells)) if line.complete else UNMEASURED,
    )


def _matrix(
    title: str,
    columns: tuple[str, ...],
    mean: FloatArray,
    se: FloatArray,
    spec: str,
    note: str = "",
) -> Table:
    rows = [
        (stage, *(_show(x, spec, e) for x, e in zip(mean[i], se[i], strict=True)))
        for i, stage in enumerate(_stages(columns[1 : len(mean)]))
    ]
    return Table(title, columns, tuple(rows), note)


def _stages(tasks: Sequence[str]) -> list[str]:
    return ["base", *(f"after {task}" for task in tasks)]


def _not_measured_again(line: Series) -> str:
    """Which scores were not measured in these cells, since the fingerprint of the weights was known already."""
    known = np.all([cell["identical"] for cell in line.cells], axis=0)
    found = [
        f"{stage} ({', '.join(np.array(line.tasks)[row])})"
        for stage, row in zip(_stages(line.tasks), known, strict=True)
        if row.any()
    ]
    if not found:
        return ""
    return f"Measured once, by another row or cell with the same fingerprint of weights: {'; '.join(found)}."


def _general(cell: Cell) -> FloatArray:
    """General ability per stage, (T+1,), NaN where it was not measured."""
    measured = [_number(x) for x in cell.get("general") or []]
    return np.array(measured + [math.nan] * (len(cell["tasks"]) + 1 - len(measured)))


def _extra(cell: Cell, metric: str) -> FloatArray:
    """Another metric's matrix, (T+1, T); all NaN where this cell did not record it."""
    t = len(cell["tasks"])
    rows = (cell.get("extra_matrices") or {}).get(metric, [[None] * t] * (t + 1))
    return PerformanceMatrix(rows, cell["tasks"]).scores


def _packs(cell: Cell) -> list[float]:
    return [_number(size) for size in cell.get("pack_bytes") or []]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _show(value: float, spec: str, se: float = math.nan) -> str:
    if math.isnan(value):
        return UNMEASURED
    text, zero = format(value, spec), format(0.0, spec)
    text = zero if text == format(-0.0, spec) else text  # -0.04 is 0.0, not -0.0
    return text if math.isnan(se) else f"{text} ± {format(se, spec.lstrip('+'))}"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _machine(text: str) -> str:
    if text == UNMEASURED:
        return ""
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text
