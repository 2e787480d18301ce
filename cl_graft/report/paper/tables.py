"""The two tables that papers print: scores of one scenario, and strategies by scenarios."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cl_graft.report.aggregate import Line
from cl_graft.report.overview import Standing
from cl_graft.report.paper.chosen import short_names
from cl_graft.report.paper.latex import MARKS, Column, Row, fits, table
from cl_graft.report.paper.standing import Scores
from cl_graft.report.protocols import FREE, TOLD, UNTOLD
from cl_graft.report.significance import ALPHA, RankedLine
from cl_graft.report.style import shortened

FILES = {UNTOLD: "untold", TOLD: "told"}
METHODS = {UNTOLD: "methods that are not told the task", TOLD: "methods that are told the task"}
LONGEST = 60  # characters of a name
OP = Column("OP")
REST = (
    Column("BWT", "+.1f"),
    Column("FM", ".1f", -1),
    Column("General", "+.1f"),
    Column("Storage", ".2f", 0),
)
NOTE = (
    "In per cent, at the end of the stream. OP: the mean over tasks ± one standard error{}. BWT: backward transfer; "
    "FM: forgetting; General: change of general ability; Storage: bytes alive a task, of the base model's in bf16. "
    f"Methods below the last rule have no budget. {MARKS} *: behind the best within the budget by a paired test, p "
    f"below {ALPHA:g} after Holm; who has none was not shown to be as good."
)
OVER = (
    "Overall performance (OP, per cent) by scenario, means over seeds and orders of tasks, of {}. Rank: the mean over "
    f"{{}} among those that hold the budget. Methods below the last rule have no budget. {MARKS}"
)


def scores(title: str, ranked: Sequence[RankedLine], label: str) -> dict[str, str]:
    """{name of a file: its table} of one group, a table for those that are not told the task and one for those that
    are: each task at the end where it has the room, OP, BWT, FM, general ability and storage."""
    whole = [s for s in ranked if s.line.complete]
    short = short_names((s.line.name for s in whole), LONGEST)
    made = {}
    for part, name in FILES.items():
        blocks = [[s for s in whole if s.line.part == part + end] for end in ("", FREE)]
        if not any(blocks):
            continue
        lines = [s.line for block in blocks for s in block]
        tasks = [Column(task) for task in shortened(lines[0].tasks)]
        rows = [[_row(s, short) for s in block] for block in blocks]
        base = _base(lines[0])
        if not fits([*tasks, OP, *REST], [base, *rows[0], *rows[1]]):  # the CSV files have them
            rows = [[_without(row, len(tasks)) for row in block] for block in rows]
            base, tasks = _without(base, len(tasks)), []
        seeds = max(len(line.cells) for line in lines)
        over = (
            f" over {seeds} seeds, of these test examples" if seeds > 1 else " over test examples"
        )
        caption = f"{title}: {METHODS[part]}. {NOTE.format(over)}"
        made[f"scores-{name}.tex"] = table(
            [*tasks, OP, *REST], [[base], *rows], caption, f"{label}-{name}"
        )
    return made


def _row(ranked: RankedLine, short: Mapping[str, str]) -> Row:
    line = ranked.line
    op, se = line.metric("op")
    rest = [line.metric("bwt")[0], line.metric("fm")[0], line.drift()[0]]
    values = [100 * x for x in (*line.mean[-1], op, *rest)] + [line.storage()]
    place = len(line.tasks)
    starred = frozenset({place} if ranked.significant else ())
    return Row(short[line.name], values, {place: 100 * se}, starred)


def _base(line: Line) -> Row:
    scores = [100 * float(x) for x in line.mean[0]]
    return Row("base model", [*scores, sum(scores) / len(scores), *[math.nan] * len(REST)])


def _without(row: Row, tasks: int) -> Row:
    """The row without its tasks."""
    errors = {place - tasks: error for place, error in row.errors.items()}
    starred = frozenset(place - tasks for place in row.starred)
    return Row(row.name, row.values[tasks:], errors, starred)


def overview(found: Scores, label: str) -> dict[str, str]:
    """{name of a file: its tables} of strategies by scenarios; what is too wide goes on in a further table."""
    short = short_names((s.who[0] for s in found.standings[1:]), LONGEST)
    made = {}
    for part, name in FILES.items():
        ranked = found.rows(part)
        if not ranked:
            continue
        blocks = [
            [_standing(s, rank, short) for s, rank in ranked if s.part == part + end]
            for end in ("", FREE)
        ]
        base = _standing(found.standings[0], math.nan, {})
        blocks = [[base], *blocks]
        n = len(found.ranks[part].blocks)
        caption = OVER.format(METHODS[part], f"{n} blocks" if n != 1 else "one block")
        pieces = _pieces(found.columns, [row for block in blocks for row in block])
        texts = []
        for k, places in enumerate(pieces):
            columns = [_column(found.columns, place) for place in places]
            chosen = [[r._replace(values=[r.values[p] for p in places]) for r in b] for b in blocks]
            more = f"-{k + 1}" if k else ""
            texts.append(table(columns, chosen, caption, f"{label}-{name}{more}"))
        made[f"scenarios-{name}.tex"] = "\n".join(texts)
    return made


def _standing(standing: Standing, rank: float, short: Mapping[str, str]) -> Row:
    scores = [math.nan if x is None else 100 * x.mean for x in standing.scores]
    return Row(short.get(standing.who[0], standing.who[0]), [*scores, rank])


def _column(names: Sequence[str], place: int) -> Column:
    return Column(names[place]) if place < len(names) else Column("Rank", ".1f", -1)


def _pieces(names: Sequence[str], rows: Sequence[Row]) -> list[list[int]]:
    """Places of the columns of each table: as many as fit beside the rank, which is in all of them."""
    pieces: list[list[int]] = [[]]
    for place in range(len(names)):
        wider = [*pieces[-1], place, len(names)]
        cut = [row._replace(values=[row.values[p] for p in wider]) for row in rows]
        if pieces[-1] and not fits([_column(names, p) for p in wider], cut):
            pieces.append([])
        pieces[-1].append(place)
    return [[*places, len(names)] for places in pieces]
