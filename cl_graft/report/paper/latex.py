"""Tables of LaTeX as papers print them: booktabs, few columns, the best in bold, no wider than two columns of text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from cl_graft.report.paper.sheet import WIDTHS, filled
from cl_graft.report.table import UNMEASURED, show, tex

EM = 8.0  # points of \footnotesize where a text has ten
GAP = 4.0  # \tabcolsep
POINTS = 72.27  # of TeX, an inch
MARKS = "Bold: the best between two rules, as it is printed; underlined: the next. Nothing is compared across a rule."


class Column(NamedTuple):
    """A head, how its numbers are written, and whether more (1) or less (-1) of it is better, or neither (0)."""

    head: str
    spec: str = ".1f"
    better: int = 1


class Row(NamedTuple):
    """A name with a number a column, NaN where unmeasured. errors: standard errors, by the column's place; starred:
    places of the numbers with a star."""

    name: str
    values: Sequence[float]
    errors: dict[int, float] = {}
    starred: frozenset[int] = frozenset()


def width(columns: Sequence[Column], rows: Sequence[Row]) -> float:
    """Inches that the table takes, about: half an em a character, as digits have, and the gaps."""
    heads = ["", *(c.head + ("$" if c.better else "") for c in columns)]
    texts = [[row.name, *(_plain(row, k, c) for k, c in enumerate(columns))] for row in rows]
    longest = [max(map(len, those)) for those in zip(heads, *texts, strict=True)]
    return (sum(longest) * EM / 2 + 2 * GAP * len(columns)) / POINTS


def fits(columns: Sequence[Column], rows: Sequence[Row]) -> bool:
    """Whether the table is no wider than the text of two columns."""
    return width(columns, rows) <= WIDTHS["2col"]


def table(
    columns: Sequence[Column], blocks: Sequence[Sequence[Row]], caption: str, label: str
) -> str:
    """A table over one column where it has the room, else over both. blocks: rows between two rules, each with a best
    of its own; of a single row nothing is best."""
    rows = [row for block in blocks for row in block]
    narrow = width(columns, rows) <= WIDTHS["1col"]
    kind = "table" if narrow else "table*"
    arrows = {1: r" $\uparrow$", -1: r" $\downarrow$", 0: ""}
    heads = ["Strategy", *(tex(c.head) + arrows[c.better] for c in columns)]
    body: list[str] = []
    for block in filter(None, blocks):
        best = [_marks(block, k, c) for k, c in enumerate(columns)]
        body.append(r"\midrule")
        for row in block:
            cells = [_cell(row, k, c, best[k]) for k, c in enumerate(columns)]
            body.append(" & ".join([tex(row.name), *cells]) + r" \\")
    lines = [
        "% needs \\usepackage{booktabs}",
        rf"\begin{{{kind}}}[t]",
        r"\centering",
        rf"\caption{{{filled(caption)}}}",
        rf"\label{{tab:{label}}}",
        r"\footnotesize",
        rf"\setlength{{\tabcolsep}}{{{GAP:g}pt}}",
        rf"\begin{{tabular}}{{@{{}}l{'r' * len(columns)}@{{}}}}",
        r"\toprule",
        " & ".join(heads) + r" \\",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\end{{{kind}}}",
    ]
    return "\n".join(lines) + "\n"


def _marks(block: Sequence[Row], k: int, column: Column) -> list[str]:
    """The best and the next number of a column as they are printed; none where it has no better or all are alike."""
    known = {show(row.values[k], column.spec) for row in block} - {UNMEASURED}
    if not column.better or len(known) < 2:
        return []
    return sorted(known, key=lambda text: -column.better * float(text))[:2]


def _cell(row: Row, k: int, column: Column, best: Sequence[str]) -> str:
    text = show(row.values[k], column.spec)
    written = tex(text)
    if text in best:
        written = rf"\{('textbf', 'underline')[best.index(text)]}{{{written}}}"
    error = row.errors.get(k, math.nan)
    if not math.isnan(error):
        written += rf" {{\scriptsize$\pm$ {show(error, column.spec.lstrip('+'))}}}"
    return written + (r"\rlap{$^{*}$}" if k in row.starred else "")


def _plain(row: Row, k: int, column: Column) -> str:
    """What is as long as the cell in print."""
    error = row.errors.get(k, math.nan)
    return show(row.values[k], column.spec, error) + ("*" if k in row.starred else "")
