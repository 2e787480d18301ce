"""Methods that are told the task and methods that are not: apart in every table, with a best and a p of their own."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from cl_graft.report import ReportedCell
from cl_graft.report.aggregate import groups
from cl_graft.report.page import index
from cl_graft.report.protocols import FREE, TOLD, UNTOLD, distinct
from cl_graft.report.significance import RankedLine, ranked_lines
from cl_graft.report.significance import table as intervals
from cl_graft.report.statistics import Strata
from cl_graft.report.table import Table
from cl_graft.report.tables import all_cells, by_task, costs, metrics, ranking
from cl_graft.report.tradeoff import bytes_vs_score
from tests.report.test_figures import panels
from tests.report.test_routing import inferred, told
from tests.report.test_tables import cell, rows_of

N = 40


def at(label: str, op: float, seed: int = 0, make: Any = cell, **changes: Any) -> dict[str, Any]:
    rows = [[0.1, 0.1], [op, 0.1], [op, op]]
    return make(label, matrix=rows, seed=seed, **changes)


def placed(cells: list[dict[str, Any]]) -> list[RankedLine]:
    """The lines of one group, every cell tested on the same N examples of two tasks."""

    def tested(reported: ReportedCell) -> tuple[str, Strata]:
        right = round(reported.cell["metrics"]["op"] * N)
        return "all", [(0.5, (np.arange(N) < right).astype(float))] * 2

    return ranked_lines([ReportedCell(Path(f"{k}"), c) for k, c in enumerate(cells)], tested)


MIXED = [
    at("individual", 0.9, make=told, budgeted=False),
    at("graftllm", 0.8, make=told),
    at("sequential", 0.3, budgeted=False),
    at("lora", 0.5),
    at("graftllm(task_ids=inferred)", 0.7, make=inferred),
]
ORDER = ["graftllm(task_ids=inferred)", "lora", "sequential", "graftllm", "individual"]
PARTS = [UNTOLD, UNTOLD, UNTOLD + FREE, TOLD, TOLD + FREE]


@pytest.mark.parametrize("make", [ranking, lambda cells: [intervals("", placed(cells))]])
def test_rows_stand_in_parts_the_best_of_each_first(make: Any) -> None:
    (made,) = make(MIXED)
    assert [row[0] for row in made.rows] == ORDER
    assert list(made.parts) == PARTS
    rows = rows_of(made)
    assert [rows[name]["Budget"] for name in ORDER] == ["10%", "10%", "none", "10%", "none"]


@pytest.mark.parametrize(
    "make", [ranking, metrics, costs, by_task, lambda cells: [all_cells(cells)]]
)
def test_every_table_has_the_parts_in_every_form(make: Any) -> None:
    (made,) = make(MIXED)
    assert list(made.parts) == PARTS
    names = list(dict.fromkeys(PARTS))
    text, tex = made.markdown(), made.latex()
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(made.rich())
    for form in (text, console.export_text()):
        places = [form.index(name) for name in names]
        assert places == sorted(places)
        assert places[0] < form.index("| lora" if form is text else "lora") < places[1]
    assert tex.count(r"\midrule") == len(names)  # one below the head, one between each two parts
    assert all(rf"\emph{{{name}}}" in tex for name in names)
    (first, *_) = csv.DictReader(io.StringIO(made.csv()))
    assert {"Task IDs", "Budget"} < set(first)
    assert len(made.csv().splitlines()) == 1 + len(MIXED)  # a program reads columns, not headings


def test_one_part_alone_has_no_heading() -> None:
    (made,) = ranking([at("lora", 0.5), at("ties", 0.4)])
    assert "**" not in made.markdown() and "emph" not in made.latex()


def test_nobody_is_compared_to_a_method_of_the_other_protocol() -> None:
    """Each protocol has a best that holds the budget; references are compared to it, and are never it."""
    cells = [c | {"seed": seed} for c in MIXED for seed in range(3)]
    known = {s.line.name: s for s in placed(cells)}
    assert [name for name, s in known.items() if s.behind is None] == [ORDER[0], ORDER[3]]
    assert known["lora"].behind is not None and known["individual"].behind is not None
    assert known["lora"].behind.mean == pytest.approx(0.5 - 0.7)
    assert known["individual"].behind.mean == pytest.approx(0.9 - 0.8)
    alone = {
        s.line.name: s
        for s in placed([c for c in cells if "config" not in c or c["label"] == ORDER[0]])
    }
    for name in ("lora", "sequential"):  # who is told has no part in the others' correction
        assert alone[name].behind == known[name].behind


def test_where_nobody_holds_the_budget_the_best_is_of_all() -> None:
    known = placed([at("joint", 0.9, budgeted=False), at("sequential", 0.3, budgeted=False)])
    assert [s.behind is None for s in known] == [True, False]


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({"a": 0.0, "b": 0.0}, []),
        ({"a": 0.0}, []),
        ({"a": 0.4, "b": 0.4}, []),
        ({"a": 0.4, "b": 0.4, "c": 0.1}, ["a", "b"]),
        ({"a": 0.4, "b": 0.0}, ["a"]),
    ],
)
def test_there_is_no_best_among_those_that_are_alike(scores: Any, best: Any) -> None:
    known = placed([at(name, op) for name, op in scores.items()])
    assert [s.line.name for s in known if s.best] == best
    (named,) = [x["names"] for x in index._leaders(known)] or [""]
    assert named == ", ".join(best)


def test_a_method_that_answers_all_prompts_alike_is_there_once_whatever_the_router() -> None:
    """Its cell with task IDs inferred is the one without a router again; without that, it stays."""
    config = {"scenario": "math-code", "strategy": "lora", "model": "mini", "seed": 0}
    plain = cell("lora", config=config)
    twin = cell("lora(task_ids=inferred)", config=config | {"task_ids": "inferred"})
    other = cell("lora(task_ids=inferred)", seed=1, config=twin["config"] | {"seed": 1})
    assert distinct([twin, plain]) == [plain]
    assert distinct([plain, other]) == [plain, other]
    assert distinct([told(), inferred()]) == [told(), inferred()]
    (members,) = groups([plain, twin]).values()
    assert members == [plain]
    assert [row[0] for row in all_cells([twin, plain]).rows] == ["lora"]


def test_each_protocol_has_a_front_of_its_own() -> None:
    """What is told the task at the same bytes takes nothing from the front of those that are not."""
    (ax,) = panels(bytes_vs_score(MIXED))
    fronts = {x.get_label(): x.get_ydata() for x in ax.lines if "front" in str(x.get_label())}
    assert {name: max(ys) for name, ys in fronts.items()} == {
        "Pareto front, not told the task": pytest.approx(70),
        "Pareto front, told the task": pytest.approx(90),
    }


def test_an_interval_is_three_columns_for_a_program() -> None:
    table = Table("", ("a", "b"), (("x", "1.5 [-0.2, 3.0]"), ("y, z", "–")))
    assert table.csv() == 'a,b,b low,b high\nx,1.5,-0.2,3.0\n"y, z",,,\n'
