"""README's table of strategies: what each keeps is written there by hand, the rest is what is known of it.

`python -m tests.strategies_table` (`make readme`) fills in the columns after the first two, whatever they held.
"""

from __future__ import annotations

import re
from pathlib import Path

from cl_graft.strategy.facts import facts

README = Path(__file__).parents[1] / "README.md"
COLUMNS = ("strategy", "what it keeps of a task", "told the task", "trained from", "source")
TABLE = re.compile(rf"^\| {COLUMNS[0]} \| {COLUMNS[1]} \|.*\n(?:\|.*\n)+", re.MULTILINE)


def rows(table: str) -> list[list[str]]:
    """The cells of each row below the head."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]


def names(row: list[str]) -> list[str]:
    """The strategies that a row is of."""
    return re.findall(r"`(\w+)`", row[0])


def filled(row: list[str]) -> list[str]:
    """The row's first two cells, and the others from what is known of its strategies."""
    known = [facts(name) for name in names(row)]
    found = dict.fromkeys(source for of in known for source in of.sources)
    links = ", ".join(f"[{source}](https://arxiv.org/abs/{source})" for source in found) or "–"
    return [*row[:2], _one([of.told for of in known]), _one([of.start for of in known]), links]


def _one(values: list[str]) -> str:
    return values[0] if len(set(values)) == 1 else ", ".join(values)


def written(table: str) -> str:
    """The table with all of its columns."""
    lines = [" | ".join(line) for line in (COLUMNS, *map(filled, rows(table)))]
    rule = "---|" * len(COLUMNS)
    head, *body = (f"| {line} |" for line in lines)
    return "\n".join([head, f"|{rule}", *body]) + "\n"


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    README.write_text(TABLE.sub(lambda found: written(found[0]), text, count=1), encoding="utf-8")
