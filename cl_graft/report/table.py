"""A titled grid of strings, and how it is written down: Markdown, CSV, LaTeX, and for a terminal."""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.console

UNMEASURED = "–"
TEXTS = ("md", "csv", "tex")  # what a table is written as
NAME = 24  # characters of a name that a terminal shows in one line, at least
PAGE = 80  # characters that a line of LaTeX's text holds, about


@dataclass(frozen=True)
class Table:
    """A titled grid of strings; every row has one string per column.

    exact: the rows for a program, if they differ. parts: of each row, the part of the table that it stands in, under
    whose name its rows are together; what a program reads has a column for it anyway. brief: the note for a terminal,
    if it is another. spared: columns that a terminal has no room for.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    exact: tuple[tuple[str, ...], ...] = ()
    parts: tuple[str, ...] = ()
    brief: str = ""
    spared: tuple[str, ...] = ()

    def sections(self) -> list[tuple[str, list[tuple[str, ...]]]]:
        """The rows of each part under its name, which is empty where the table has one part alone."""
        if len(set(self.parts)) < 2:
            return [("", list(self.rows))]
        together: dict[str, list[tuple[str, ...]]] = {}
        for part, row in zip(self.parts, self.rows, strict=True):
            together.setdefault(part, []).append(row)
        return list(together.items())

    def markdown(self) -> str:
        """A heading, a pipe table with its numbers to the right and a row with the name of each part, and the note."""
        rule = "|:--" + "|--:" * (len(self.columns) - 1) + "|"
        grid = [self.columns]
        for part, rows in self.sections():
            grid += [(f"**{part}**", *[""] * (len(self.columns) - 1))] if part else []
            grid += rows
        head, *body = ("| " + " | ".join(map(_cell, row)) + " |" for row in grid)
        return "\n".join([f"### {self.title}", "", head, rule, *body, "", self.note]).rstrip()

    def csv(self) -> str:
        """The grid for a program: "mean ± s.e." becomes two columns and "mean [low, high]" three, a number has no
        thousands separator, and an unmeasured value is empty."""
        rows = self.exact or self.rows
        ends = [_ends([row[i] for row in rows]) for i in range(len(self.columns))]
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        head = zip(self.columns, ends, strict=True)
        writer.writerow([name + end for name, those in head for end in ("", *those)])
        for row in rows:
            fields: list[str] = []
            for cell, those in zip(row, ends, strict=True):
                parts = [cell] if not those else [p for p in re.split(r" ± | \[|, |\]", cell) if p]
                fields += [*map(_machine, parts), *[""] * (1 + len(those) - len(parts))]
            writer.writerow(fields)
        return text.getvalue()

    def latex(self) -> str:
        """A booktabs table with its numbers to the right; every character of the text stands for itself.

        One that is wider than a page's text is made smaller to fit.
        """
        grid = (self.columns, *self.rows)
        wide = sum(max(map(len, column)) + 3 for column in zip(*grid, strict=True)) > PAGE
        head, body = self._tex_row(self.columns), list[str]()
        for part, rows in self.sections():
            span = rf"\multicolumn{{{len(self.columns)}}}{{l}}{{\emph{{{tex(part)}}}}} \\"
            body += [*([r"\midrule"] if body else []), *([span] if part else [])]
            body += map(self._tex_row, rows)
        lines = [
            "% needs \\usepackage{booktabs,graphicx}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{tex(self.title)}}}",
            *([r"\resizebox{\textwidth}{!}{%"] if wide else []),
            rf"\begin{{tabular}}{{l{'r' * (len(self.columns) - 1)}}}",
            *(r"\toprule", head, r"\midrule", *body, r"\bottomrule"),
            r"\end{tabular}" + ("}" if wide else ""),
            *([rf"\par\smallskip\footnotesize {tex(self.note)}"] if self.note else []),
            r"\end{table}",
        ]
        return "\n".join(lines) + "\n"

    @staticmethod
    def _tex_row(row: tuple[str, ...]) -> str:
        return " & ".join(map(tex, row)) + r" \\"

    def write(self, stem: Path) -> list[Path]:
        """STEM.md, STEM.csv and STEM.tex, each whole or not at all."""
        texts = (self.markdown() + "\n", self.csv(), self.latex())
        return [
            write_atomic(stem.with_name(f"{stem.name}.{kind}"), text.encode())
            for kind, text in zip(TEXTS, texts, strict=True)
        ]

    def rich(self) -> rich.console.Group:
        """The grid for a terminal, a grid for each part."""
        from rich.console import Group

        sections = self.sections()
        titles = [
            "\n".join(filter(None, (self.title, sections[0][0]))),
            *(p for p, _ in sections[1:]),
        ]
        notes = [*[""] * (len(sections) - 1), self.brief or self.note]
        grids = zip(titles, sections, notes, strict=True)
        return Group(*(self._rich(title, rows, note) for title, (_, rows), note in grids))

    def _rich(self, title: str, rows: Sequence[tuple[str, ...]], note: str) -> Any:
        from rich.table import Table as RichTable
        from rich.text import Text

        grid = RichTable(title=Text(title), caption=Text(note) if note else None)
        shown = [i for i, column in enumerate(self.columns) if column not in self.spared]
        for i in shown:
            # folded, since names that lost their ends look alike
            side: Any = "right" if i else "left"
            least = None if i else min(NAME, max((len(row[0]) for row in rows), default=0))
            grid.add_column(Text(self.columns[i]), justify=side, overflow="fold", min_width=least)
        for row in rows:
            grid.add_row(*(Text(row[i]) for i in shown))  # Text: brackets in a label are not markup
        return grid


def show(value: float, spec: str, se: float = math.nan) -> str:
    if math.isnan(value):
        return UNMEASURED
    text, zero = format(value, spec), format(0.0, spec)
    text = zero if text == format(-0.0, spec) else text  # -0.04 is 0.0, not -0.0
    return text if math.isnan(se) else f"{text} ± {format(se, spec.lstrip('+'))}"


def show_interval(ends: Sequence[float], spec: str) -> str:
    """Write a mean with the ends of its interval, where those are known. ends: mean, low and high."""
    mean, low, high = (show(x, spec) for x in ends)
    return mean if low == UNMEASURED else f"{mean} [{low}, {high}]"


def write_atomic(path: Path, data: bytes) -> Path:
    """Write a file beside its place and move it there, so that no reader sees half of it.

    It is not pushed to the disk: a report has many files, and is made again in seconds. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path


_TEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': "''"}
    | {
        "–": "--",
        "−": "$-$",
        "±": r"$\pm$",
        "Δ": r"$\Delta$",
        "ρ": r"$\rho$",
        "→": r"$\rightarrow$",
        "≥": r"$\geq$",
    }
    | {"·": r"\textperiodcentered{}", "…": r"\ldots{}", "\n": " "}
)


def tex(text: str) -> str:
    """Escaped; a number's minus is one, and a cell that starts with a bracket does not end a row's argument."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", text).translate(_TEX)
    return "{}" + text if text.startswith("[") else text


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _ends(cells: Sequence[str]) -> tuple[str, ...]:
    """What the further columns of a column's errors or intervals are called."""
    if any(" ± " in cell for cell in cells):
        return (" s.e.",)
    number = r"[-+]?[\d.]+"
    interval = re.compile(rf"{number} \[{number}, {number}\]")
    return (" low", " high") if any(map(interval.fullmatch, cells)) else ()


def _machine(text: str) -> str:
    if text == UNMEASURED:
        return ""
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})+(\.\d+)?", text) else text
