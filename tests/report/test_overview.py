"""All strategies over all scenarios, orders and budgets: means, ranks and the names of what differs."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from cl_graft.bench.report import make
from cl_graft.report import ReportedCell, find, page
from cl_graft.report.overview import overview
from cl_graft.report.page.names import pages
from cl_graft.report.statistics import Strata
from cl_graft.report.table import Table
from tests.command import Call
from tests.report.test_protocols import at
from tests.report.test_routing import told
from tests.report.test_tables import cell, rows_of

N = 20


def reported(cells: list[dict[str, Any]]) -> list[ReportedCell]:
    return [ReportedCell(Path(str(k)), c) for k, c in enumerate(cells)]


def right(f: ReportedCell, task: str | None = None, base: bool = False) -> tuple[str, Strata]:
    """All seeds and orders are tested on the same N examples a task, as many right as the cell's score says."""
    row = dict(zip(f.cell["tasks"], f.cell["matrix"][0 if base else -1], strict=True))
    scores = row.values() if task is None else [row[task]]
    strata = [(np.arange(N) < round(N * x)).astype(float) for x in scores]
    return "all", [(1 / len(strata), x) for x in strata]


def shown(cells: list[dict[str, Any]]) -> Table:
    return overview(reported(cells), right)


def ordered(label: str, op: float, tasks: str, seed: int = 0, **options: Any) -> dict[str, Any]:
    """A cell of a scenario whose option says the order of its tasks, as `mini`'s does; its name tells the option."""
    given = {"mini": {"tasks": tasks, **options}} if tasks != "math,code" else {"mini": options}
    config = {"scenario": "mini", "strategy": label, "seed": seed, "options": given}
    name = f"mini(tasks={tasks})" if tasks != "math,code" else "mini"
    return at(label, op, seed, tasks=tasks.split(","), config=config, scenario=name)


def test_a_row_a_strategy_and_a_column_a_scenario_and_budget() -> None:
    cells = [
        at("lora", 0.5),
        at("ties", 0.3),
        at("lora", 0.8, scenario="trace"),
        at("lora", 0.6, budget="5%"),
        at("graftllm", 0.9, make=told),
    ]
    made = shown(cells)
    assert made.columns[5:-1] == ("math-code · 10%", "trace · 10%", "math-code · 5%")
    rows = rows_of(made)
    assert [name for name in rows] == ["base model", "lora", "ties", "graftllm"]
    assert rows["base model"]["math-code · 10%"].startswith("10.0 [")
    assert rows["lora"]["trace · 10%"].startswith("80.0 [")
    assert (rows["ties"]["trace · 10%"], rows["graftllm"]["math-code · 5%"]) == ("–", "–")
    assert made.parts[0] == "" and len(set(made.parts)) == 3


def test_what_is_the_same_for_all_has_no_part_in_a_columns_name() -> None:
    assert shown([at("lora", 0.5)]).columns[5:-1] == ("math-code",)
    assert shown([at("lora", 0.5), at("lora", 0.5, model="8b")]).columns[5:-1] == (
        "math-code · mini",
        "math-code · 8b",
    )


def test_ranks_are_means_over_the_cells_that_all_have() -> None:
    """Two scenarios: a is 1st and 2nd, b 2nd and 1st, c 3rd and 3rd; what a alone has, and what has but one, is left."""
    cells = [at(n, x, scenario="one") for n, x in {"a": 0.9, "b": 0.5, "c": 0.1}.items()]
    cells += [at(n, x, scenario="two") for n, x in {"a": 0.5, "b": 0.9, "c": 0.1}.items()]
    cells += [at("a", 0.9, scenario="three"), at("graftllm", 1.0, make=told, scenario="one")]
    rows = rows_of(shown(cells))
    assert rows["c"]["Rank"] == "3.0 [3.0, 3.0]"
    assert (
        rows["a"]["Rank"] == rows["b"]["Rank"] == "1.5 [1.0, 3.0]"
    )  # 1.5 ± 12.7 * 0.5, within the ranks there are
    assert {rows[n]["Cells ranked"] for n in "abc"} == {"2"}
    assert rows["graftllm"]["Rank"] == "–"  # nobody else is told the task


def test_ties_share_their_ranks() -> None:
    rows = rows_of(shown([at(n, x) for n, x in {"a": 0.5, "b": 0.5, "c": 0.0, "d": 0.0}.items()]))
    assert [rows[n]["Rank"] for n in "abcd"] == ["1.5", "1.5", "3.5", "3.5"]


def test_orders_of_the_same_tasks_are_one_column_by_their_mean() -> None:
    """A seed's score is the mean over its orders, each example's too; a seed without all of them is left out."""
    cells = [
        ordered("lora", op, tasks, seed)
        for seed in (0, 1)
        for op, tasks in ((0.4, "math,code"), (0.8, "code,math"))
    ]
    cells.append(ordered("lora", 1.0, "code,math", seed=2))
    made = shown(cells)
    assert made.columns[5:-1] == ("mini, 2 orders",)
    assert rows_of(made)["lora"]["mini, 2 orders"].startswith("60.0 [")
    assert rows_of(made)["lora"]["Interval over"] == "seeds, examples"
    two = [ordered("lora", 0.4, tasks, steps=9) for tasks in ("math,code", "code,math")]
    assert shown(two).columns[5:-1] == ("mini(steps=9), 2 orders",)
    other = shown([ordered("lora", 0.4, "math,code"), ordered("lora", 0.4, "math,code", steps=9)])
    assert len(other.columns[5:-1]) == 2  # another option is another scenario


def test_the_base_has_examples_and_no_seeds() -> None:
    """Three seeds with the same answers: Wilson's limits of 2 of N in each of two tasks."""
    base = rows_of(shown([at("lora", 0.5, seed) for seed in range(3)]))["base model"]
    z, p = 1.959964, 0.1
    middle, half = p + z * z / (2 * N), z * math.sqrt(p * (1 - p) / N + z * z / (4 * N * N))
    ends = [(middle + way * half) / (1 + z * z / N) for way in (-1, 1)]
    low, high = 0.1 - (p - ends[0]) / math.sqrt(2), 0.1 + (ends[1] - p) / math.sqrt(2)
    assert base["math-code"] == f"10.0 [{100 * low:.1f}, {100 * high:.1f}]"
    assert base["Interval over"] == "examples"


def test_it_is_first_on_the_page_and_in_files(tmp_path: Path, call: Call) -> None:
    make(tmp_path, cells=8, examples=4, strategies=4, scenarios=2)
    done = call("report", tmp_path)
    assert done.code == 0 and "Overview" in done.out
    text = (tmp_path / "report" / "index.html").read_text()
    assert text.index('<section id="overview">') < text.index('<section id="synthetic-0')
    assert text.count("Not told the task at test") >= 2
    with (tmp_path / "report" / "overview.csv").open(newline="") as file:
        rows = {row["Strategy"]: row for row in csv.DictReader(file)}
    assert set(rows) == {
        "base model",
        "graftllm",
        "lora(task_ids=inferred)",
        "model_grafting",
        "model_tailor",
    }
    for name in ("synthetic-0", "synthetic-0 low", "synthetic-0 high", "Rank"):
        assert float(rows["model_tailor"][name]) >= 0
    told = (tmp_path / "report" / "overview.md").read_text()
    assert "**Told the task at test**" in told


# --- names of pages ---------------------------------------------------------------------------


def names(cells: list[dict[str, Any]]) -> list[str]:
    return [
        name.removeprefix("cells/").removesuffix(".html")
        for name in pages(reported(cells)).values()
    ]


def test_a_page_is_called_by_what_tells_its_cell_from_the_others() -> None:
    assert names([cell("lora"), cell("ties")]) == ["lora", "ties"]
    many = [cell(f"lora(rank={r}, alpha=2)", scenario="mini(steps=9)") for r in (8, 16)]
    assert names(many) == ["lora-rank-8", "lora-rank-16"]  # what all have tells nothing
    orders = [cell(tasks=t.split(","), scenario=f"mini(tasks={t})") for t in ("a,b", "b,a")]
    assert names(orders) == ["mini-tasks-a-b_graftllm", "mini-tasks-b-a_graftllm"]
    assert names([cell(seed=0), cell(seed=1)]) == ["graftllm_seed0", "graftllm_seed1"]
    two = [cell("lora(rank=8)", budget="5%"), cell("lora(rank=8)")]
    assert names(two) == ["lora_5pct", "lora_10pct"]
    assert names([cell(model="/m/llama"), cell(scenario="trace")]) == [
        "math-code_graftllm_llama",
        "trace_graftllm_mini",
    ]
    assert names([cell(tasks=["math", "code"]), cell(tasks=["code", "math"])]) == [
        "graftllm_math-code",
        "graftllm_code-math",
    ]


def test_no_two_pages_share_a_name() -> None:
    alike = [
        cell("Lora"),
        cell("lora"),
        cell("lora", model="x/mini"),
        cell("l" * 200),
        cell("l" * 201),
    ]
    found = names(alike)
    assert len({name.lower() for name in found}) == len(alike)
    assert all(len(name) < 200 for name in found)


def test_pages_that_are_called_otherwise_now_are_not_left_behind(tmp_path: Path) -> None:
    make(tmp_path, cells=2, examples=4, strategies=2, scenarios=1)
    page.write(found := find([tmp_path]), tmp_path / "report")
    assert {p.stem for p in (tmp_path / "report" / "cells").iterdir()} == {
        "graftllm",
        "lora-task-ids-inferred",
    }
    told = json.loads((found[0].path / "result.json").read_text())
    (found[0].path / "result.json").write_text(json.dumps(told | {"seed": 7}))
    page.write(find([tmp_path]), tmp_path / "report")
    assert {p.stem for p in (tmp_path / "report" / "cells").iterdir()} == {
        "graftllm_seed7",
        "lora-task-ids-inferred_seed0",
    }
