"""README's tables of what was measured: which rows they have is written there by hand, their figures are the published ones.

`python -m tests.published_table` (`make readme`) fills them in, each from the ranking that a comment before it names.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
ALIKE = 3  # seeds that a row is of where it does not say how many
TABLE = re.compile(
    r"(<!-- table of (\S+) -->\n(?:(?!\|).*\n)*)(\| Strategy \|.*\n\|:.*\n(?:\|.*\n)+)"
)
UNTOLD, ROUTED, TOLD = "Not told the task at test", "Inferred by a router", "Told the task at test"
FREE = ", without a budget"
PLAIN = ("Storage %", "Bytes alive", "Train s")


def published(ranking: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(part of the table, strategy) -> the row of the ranking, of whole rows."""
    found = {}
    with ranking.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if "incomplete" not in row["Strategy"]:
                name = re.sub(r"(, |\b)(preset|task_ids)=\w+", "", row["Strategy"])
                told = {"given": TOLD, "not needed": UNTOLD}.get(row["Task IDs"], ROUTED)
                part = told + (FREE if row["Budget"] == "none" else "")
                found[part, re.sub(r"\((, )?\)", "", name)] = row
    return found


def filled(table: str, ranking: Path) -> str:
    """The table with the figures of every row that it names."""
    rows, part = published(ranking), ""
    head, rule, *lines = table.splitlines()
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    done = [head, rule]
    for line in lines:
        name = line.strip("|").split("|")[0].strip()
        if name.startswith("**"):
            part = name.strip("*")
            done.append(line)
        else:
            row = rows[part, name.partition(" (")[0]]
            seeds = "" if row["Seeds"] == str(ALIKE) else f" ({row['Seeds']} seeds)"
            cells = [name.partition(" (")[0] + seeds, *(_cell(row, of) for of in columns[1:])]
            done.append(f"| {' | '.join(cells)} |")
    return "\n".join(done) + "\n"


def _cell(row: dict[str, str], column: str) -> str:
    if column == "Bytes alive":
        return f"{int(row[column]):,}"
    if column in PLAIN:
        return row[column]
    if column in ("BWT", "General Δ"):
        return f"{float(row[column]):+.1f}"
    return f"{float(row[column]):.1f} ± {float(row[f'{column} s.e.']):.1f}"


def written(text: str) -> str:
    """README with the figures of its tables as they are published."""
    return TABLE.sub(lambda found: found[1] + filled(found[3], README.parent / found[2]), text)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
