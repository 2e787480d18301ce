"""Figures that publications print for a stream, as rows of reference: quoted, never measured here.

quoted.json has them by the scenario and the tasks in their order; a mean over orders, by the tasks alone.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cl_graft.config import RunConfig
from cl_graft.report.aggregate import groups
from cl_graft.report.protocols import Cell
from cl_graft.report.table import UNMEASURED, Table

FILE = Path(__file__).with_name("quoted.json")
NOTE = (
    "Quoted from what each row names, not measured here: other models, data, sizes of sets and recipes. In per cent, "
    "as printed there. What is not printed is left out."
)


def quoted(cells: Sequence[Cell]) -> list[Table]:
    """A table for each group on whose stream figures are published; a row a figure."""
    tables = []
    for title, members in groups(cells).items():
        if rows := published(members[0]):
            columns = ("Quoted method", "Model", "OP", "BWT", "Setting", "Source")
            told = tuple(
                (
                    r["method"],
                    r["model"],
                    _told(r["op"]),
                    _told(r["bwt"]),
                    r["setting"],
                    r["source"],
                )
                for r in rows
            )
            tables.append(Table(f"Quoted: {title}", columns, told, NOTE))
    return tables


def published(cell: Cell) -> list[dict[str, Any]]:
    """The figures for the cell's stream: method, model, op and bwt in per cent (None: not printed), setting, source."""
    scenario = RunConfig.short(cell.get("config", {}).get("scenario", ""))
    rows = []
    for setting in json.loads(FILE.read_text("utf-8")):
        tasks, learned = setting["tasks"], list(cell["tasks"])
        same = tasks == learned if setting["ordered"] else sorted(tasks) == sorted(learned)
        if setting["scenario"] == scenario and same:
            rows += setting["rows"]
    return rows


def _told(value: float | None) -> str:
    return UNMEASURED if value is None else f"{value:g}"
