"""The page of one cell: its scores, what made it, and every test example."""

from __future__ import annotations

import json
from collections import Counter
from functools import lru_cache
from html import escape
from pathlib import Path
from typing import Any

from markupsafe import Markup

from cl_graft.report import ReportedCell
from cl_graft.report.aggregate import ALIKE, ability, alive, packs, scored_by
from cl_graft.report.examples import OUTCOMES, RIGHT, Answer, ExampleRow, breakdown, latest
from cl_graft.report.page.template import render
from cl_graft.report.protocols import Cell, protocol
from cl_graft.report.provenance import commands
from cl_graft.report.routing import (
    ACCURACY_NOTE,
    BASE,
    CONFUSION_NOTE,
    confusions,
    inferred,
    routed,
)
from cl_graft.report.table import UNMEASURED, write_atomic
from cl_graft.store import prompts
from cl_graft.store.prompts import Asked

MOST = 400  # examples of a task that a page shows
LONGEST = 4000  # characters of a text that a page shows


def write(reported: ReportedCell, path: Path, group: str) -> None:
    """Make the page at `path`. group: the section of the index that the cell is in."""
    cell = reported.cell
    asked = _asked(reported.path.parent, cell.get("data", ""))
    experiences = [f"after {task}" for task in cell["tasks"]]
    accuracy = [
        (n, x) for n, x in zip(["base", *experiences], cell["routing_accuracy"], strict=False)
    ]
    page = render(
        "cell.html",
        cell=cell,
        name=reported.path.name,
        group=group,
        matrix=list(zip(["base", *experiences], cell["matrix"], cell["stderr"], strict=True)),
        general=[*cell["general"], *[None] * (len(experiences) + 1 - len(cell["general"]))],
        ability=ability(cell),
        by_pack=_by_pack(cell, experiences),
        moved=[
            (task, kl)
            for task, kl in zip(cell["tasks"], cell.get("kl_to_base", []), strict=False)
            if kl
        ],
        protocol=protocol(cell),
        scored=scored_by([cell]),
        bytes=_bytes(cell),
        accuracy=[(n, x) for n, x in accuracy if x is not None],
        confusion=next(iter(confusions(routed([cell]))), None),
        confusion_note=CONFUSION_NOTE,
        accuracy_note=ACCURACY_NOTE,
        tasks=[
            _task(t, rows, cell, bool(asked))
            for t, rows in breakdown(reported.path, cell, asked).items()
        ],
        asked=bool(asked),
        right=RIGHT,
        most=MOST,
        outcomes=OUTCOMES,
        losses=_losses(reported.path),
        command="\n".join(commands([cell])),
        config=json.dumps(cell["config"], indent=1, ensure_ascii=False),
        options=json.dumps(cell["options"], indent=1, ensure_ascii=False),
    )
    write_atomic(path, page.encode("utf-8", "replace"))


def _by_pack(cell: Cell, experiences: list[str]) -> list[tuple[str, list[float | None]]]:
    """General ability with each pack on, after each experience; nothing where packs do not answer by themselves."""
    if ability(cell) in (ALIKE, UNMEASURED):
        return []
    return list(zip(experiences, cell["general_packs"][1:], strict=False))


def _bytes(cell: Cell) -> dict[str, float | None]:
    """What is alive, the tasks' own packs among it, and the largest pack of a task; none before the first task."""
    kept = [None, *alive(cell)][-1]
    own = None if kept is None else kept - sum(cell["shared_bytes"].values())
    return {"alive": kept or 0.0, "own": own, "largest": max(packs(cell), default=None)}


def _task(name: str, rows: list[ExampleRow], cell: Cell, asked: bool) -> dict[str, Any]:
    outcomes = [row.outcome for row in rows]
    counts = Counter(outcomes)
    shown = zip(rows[:MOST], outcomes, strict=False)
    of = name if inferred(cell) else None
    return {
        "name": name,
        "count": len(rows),
        "rows": Markup("\n".join(_row(row, outcome, asked, of) for row, outcome in shown)),
        "answered": _answered(list(cell["tasks"]), name, latest(cell)),
        "counts": [(kind, counts[kind]) for kind in OUTCOMES if counts[kind]],
    }


def _answered(tasks: list[str], name: str, last: int) -> str:
    """Which models the answers of a task's table are of."""
    learned = tasks.index(name) + 1
    after = [tasks[i - 1] for i in dict.fromkeys((learned, last)) if learned <= last]
    return ", ".join(["by the base model", *(f"after {task}" for task in after)])


def _asked(out: Path, data: str) -> dict[str, list[Asked]]:
    kept = prompts.file(out, data)
    return _read(out, data, kept.stat().st_mtime_ns) if kept.is_file() else {}


@lru_cache(maxsize=16)
def _read(out: Path, data: str, _written: int) -> dict[str, list[Asked]]:
    """Once for all cells of the data, unless they change meanwhile."""
    return prompts.recall(out, data)


def _losses(path: Path) -> list[dict[str, Any]]:
    """A line of each experience's training loss: as the points of a polyline in a box of 100 by 30."""
    curves = []
    for file in sorted(path.glob("experiences/*/experience.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        losses = [p["loss"] for p in record["losses"] if p.get("loss") is not None]
        if len(losses) < 2:
            continue
        low, high = min(losses), max(losses)
        points = [
            f"{100 * k / (len(losses) - 1):.1f},{29 - 28 * (x - low) / ((high - low) or 1):.1f}"
            for k, x in enumerate(losses)
        ]
        ends = {"first": losses[0], "last": losses[-1], "low": low, "high": high}
        curves.append({"task": record["task"], "points": " ".join(points), **ends})
    return curves


def _row(row: ExampleRow, outcome: str, asked: bool, of: str | None = None) -> str:
    """A test example as a row of its table, escaped: the bulk of a report, for which a template takes too long.

    of: its task, where a router chose what it was answered as, which is told then.
    """
    cells = []
    if asked:
        told = (row.asked.prompt, row.asked.reference) if row.asked else ("", "")
        cells = [
            f'<td data-l="{label}"><span class="t">{_text(text)}</span></td>'
            for label, text in zip(("Prompt", "Reference"), told, strict=True)
        ]
    cells += [_answer(row.before, "Base model"), _answer(row.learned, "Once learned", of)]
    if row.end is not None and row.end == row.learned:
        kind = _kind(row.end)
        cells.append(f'<td data-l="At the end" class="{kind} same">{_mark(row.end)}same</td>')
    else:
        cells.append(_answer(row.end, "At the end", of))
    return (
        f'<tr data-o="{outcome}"><td>{row.number}</td>{"".join(cells)}'
        f'<td class="o o-{outcome}">{outcome or "not learned yet"}</td></tr>'
    )


def _answer(answer: Answer | None, label: str, of: str | None = None) -> str:
    if answer is None:
        return f'<td data-l="{label}"></td>'
    note = f' title="{escape(answer.note[:300])}"' if answer.note else ""
    text = f'<span class="t"{note}>{_text(answer.text)}</span>'
    taken = "" if of is None else _taken(answer, of)
    return f'<td data-l="{label}" class="{_kind(answer)}">{_mark(answer)}{text}{taken}</td>'


def _taken(answer: Answer, of: str) -> str:
    """What the router took the prompt for, marked where that is not the task that it is of."""
    if answer.taken_for is None:
        return ""
    wrongly = "" if answer.taken_for == of else ' class="off"'
    return f"<small{wrongly}>taken for {escape(answer.taken_for or f'the {BASE}')}</small>"


def _kind(answer: Answer) -> str:
    return "y" if answer.score >= RIGHT else "n"


def _mark(answer: Answer) -> str:
    """Whether it is right, for those who do not see colours and for those who hear a page; a share as a number."""
    sign, told = ("✓", "right") if answer.score >= RIGHT else ("✗", "wrong")
    share = "" if answer.score in (0, 1) else f" {answer.score:.2f}"
    return f'<b class="m"><i aria-hidden="true">{sign}</i><span class="sr">{told}</span>{share}</b>'


def _text(text: str) -> str:
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]} … ({len(text):,} characters)"
    return escape(text)
