"""Tables of a sweep: the numbers in them, what is averaged and what is only flagged."""

from __future__ import annotations

import copy
import csv
import io
import random
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from cl_graft.errors import CLGraftError
from cl_graft.matrix import METRICS, PerformanceMatrix
from cl_graft.report.aggregate import ReportError, groups, lines_of, told_apart
from cl_graft.report.table import Table, write_atomic
from cl_graft.report.tables import costs, matrices, metrics, ranking, write_tables

Rows = list[list[float | None]]

# base 20 / 30; math learned at 80, ends at 60; code learned at 70
FORGETS: Rows = [[0.2, 0.3], [0.8, 0.3], [0.6, 0.7]]


def cell(label: str = "graftllm", matrix: Rows = FORGETS, **changes: Any) -> dict[str, Any]:
    """A cell as `cl-graft report --json` prints it, for two tasks."""
    tasks = changes.get("tasks", ["math", "code"])
    metrics = PerformanceMatrix(matrix, tasks=tasks).metrics()
    made: dict[str, Any] = {
        "scenario": "math-code",
        "strategy": label.partition("(")[0],
        "label": label,
        "model": "mini",
        "seed": 0,
        "budget": "10%",
        "budget_bytes": 200_000,
        "budgeted": True,
        "tasks": tasks,
        "matrix": matrix,
        "n": [[None if x is None else 100 for x in row] for row in matrix],
        "stderr": [[None if x is None else 0.01 for x in row] for row in matrix],
        "metrics": {k: None if v != v else v for k, v in metrics.items()},
        "general": [0.5, 0.48, 0.47],
        "pack_bytes": [190_000, 199_600],
        "shared_bytes": {},
        "alive_bytes": [190_000, 389_600],
        "routing": [{task: {} for task in tasks} for _ in matrix],
        "routing_accuracy": [None] * len(matrix),
        "base_bytes": 2_000_000,
        "seconds": {"train": 1234.5, "compress": 10.0, "evaluate": 5.0, "harness": 0.5},
        "spent": 700.0,
        "tokens": 1000,
        "peak_memory_mb": 500.0,
        "extra_matrices": {},
        "identical": [[False] * len(tasks) for _ in matrix],
        "complete": True,
    }
    return made | changes


def half_done(label: str = "graftllm", **changes: Any) -> dict[str, Any]:
    """One of two tasks learned: the last experience has not run."""
    rows: Rows = [[0.2, 0.3], [0.9, 0.9], [None, None]]
    unfinished = {"complete": False, "general": [0.5, 0.4], "pack_bytes": [190_000]}
    unfinished |= {"alive_bytes": [190_000]}
    return cell(label, rows, **(unfinished | changes))


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    """{first column: {column: text}}"""
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


# --- ranking ----------------------------------------------------------------------------------


def test_tables_say_by_which_scorer_and_convention_each_figure_is() -> None:
    told = {"math": {"number": "the last number"}, "code": {"tests": "pass@1"}}
    older, one, other = cell(), cell(conventions=told), cell("lora", conventions=told)
    said = "Scored: math by number (the last number); code by tests (pass@1)."
    for made in (ranking, matrices):
        (table, *_) = made([one, other])
        assert said in table.note
        (table, *_) = made([older])
        assert "Scored" not in table.note


def test_a_row_of_the_ranking_worked_by_hand() -> None:
    (table,) = ranking([cell()])
    assert table.title == "Ranking: math-code · mini · budget 10%"
    assert rows_of(table)["graftllm"] == {
        "Strategy": "graftllm",
        "Task IDs": "not needed",
        "Budget": "10%",
        "math": "60.0 ± 1.0",
        "code": "70.0 ± 1.0",
        "OP": "65.0 ± 0.7",  # sqrt(.01^2 + .01^2) / 2
        "BWT": "-20.0",  # paired examples: no standard error from one seed
        "FM": "20.0",
        "General Δ": "-3.0",
        "General of": "one model",
        "±": "examples",
        "Storage %": "9.74",  # 389,600 bytes alive over two tasks of 2,000,000
        "Bytes alive": "389,600",
        "Largest pack": "199,600",
        "Train s": "1,234.5",
        "Seeds": "1",
    }


def test_seeds_are_averaged_and_the_error_is_theirs() -> None:
    worse: Rows = [[0.2, 0.3], [0.8, 0.3], [0.4, 0.6]]
    cells = [
        cell(seed=0),
        cell(matrix=worse, seed=1, general=[0.5, 0.5, 0.45], alive_bytes=[100_000, 200_100]),
    ]
    (table,) = ranking(cells)
    row = rows_of(table)["graftllm"]
    assert row["math"] == "50.0 ± 10.0"  # 60 and 40: deviation 14.14 over sqrt(2)
    assert row["code"] == "65.0 ± 5.0"
    assert row["OP"] == "57.5 ± 7.5"
    assert row["BWT"] == "-30.0 ± 10.0"
    assert row["General Δ"] == "-4.0 ± 1.0"
    assert row["Storage %"] == "7.37"  # (9.74 + 5.0025) / 2
    assert row["Bytes alive"] == "294,850"
    assert row["Seeds"] == "2"


def test_the_best_op_comes_first_and_unmeasured_ops_come_last() -> None:
    def ends_at(math: float | None) -> Rows:
        return [[0.2, 0.3], [0.8, 0.3], [math, 0.7]]

    cells = [
        half_done("ewc"),
        cell("unknown", ends_at(None)),
        cell("sequential", ends_at(0.1)),
        cell("graftllm", ends_at(0.8)),
        cell("lora", ends_at(0.5)),
    ]
    (table,) = ranking(cells)
    names = [row[0] for row in table.rows]
    assert names[:4] == ["graftllm", "lora", "sequential", "unknown"]
    assert names[4].startswith("ewc (incomplete")


def test_an_incomplete_cell_is_flagged_and_never_averaged() -> None:
    (table,) = ranking([cell(seed=0), half_done(seed=1), cell(seed=2)])
    assert [row[0] for row in table.rows] == [
        "graftllm",
        "graftllm (incomplete: seed 1, 1 of 2 tasks)",
    ]
    whole, part = rows_of(table).values()
    assert (whole["math"], whole["OP"], whole["Seeds"]) == ("60.0 ± 0.0", "65.0 ± 0.0", "2")
    for column in ("math", "code", "OP", "BWT", "FM", "General Δ", "Seeds"):
        assert part[column] == "–", column
    assert part["Storage %"] == "9.50"  # of the one task so far


def test_an_incomplete_cell_shows_no_op_even_where_its_last_row_is_measured() -> None:
    (table,) = ranking([cell(complete=False)])
    (row,) = rows_of(table).values()
    assert (row["math"], row["OP"]) == ("60.0 ± 1.0", "–")


def test_a_score_that_one_seed_lacks_is_unmeasured_in_the_mean() -> None:
    gap: Rows = [[0.2, 0.3], [0.8, 0.3], [None, 0.7]]
    (table,) = ranking([cell(seed=0), cell(matrix=gap, seed=1)])
    row = rows_of(table)["graftllm"]
    assert (row["math"], row["code"], row["OP"]) == ("–", "70.0 ± 0.0", "–")


@pytest.mark.parametrize("missing", [None, [], [None, None, None]])
def test_what_was_not_recorded_is_a_dash(missing: Any) -> None:
    bare = cell(general=missing, pack_bytes=[], alive_bytes=[], seconds={}, stderr=None)
    (table,) = ranking([bare])
    row = rows_of(table)["graftllm"]
    assert (row["math"], row["OP"]) == ("60.0", "65.0")
    for column in ("General Δ", "Storage %", "Bytes alive", "Largest pack", "Train s"):
        assert row[column] == "–", column


def test_a_tiny_loss_is_not_printed_as_minus_zero() -> None:
    rows: Rows = [[0.2, 0.3], [0.8, 0.3], [0.7999, 0.7]]
    (table,) = ranking([cell(matrix=rows)])
    assert rows_of(table)["graftllm"]["BWT"] == "+0.0"


@given(st.randoms(use_true_random=False))
def test_the_order_of_the_cells_does_not_change_the_ranking(rng: random.Random) -> None:
    cells = [
        cell(label, [[0.2, 0.3], [0.8, 0.3], [0.25 * k, 0.5 + 0.125 * seed]], seed=seed)
        for k, label in enumerate(("ties", "lora", "graftllm"))
        for seed in range(3)
    ]
    expected = ranking(cells)
    rng.shuffle(cells)
    assert ranking(cells) == expected


def test_reporting_leaves_the_cells_as_they_were() -> None:
    cells = [cell(seed=0), cell(seed=1), half_done("lora")]
    before = copy.deepcopy(cells)
    ranking(cells)
    matrices(cells)
    assert cells == before


# --- groups -----------------------------------------------------------------------------------


def test_scenario_model_and_budget_each_make_a_table_of_their_own() -> None:
    cells = [cell(), cell(scenario="trace"), cell(model="8b"), cell(budget="5%"), cell("lora")]
    assert [table.title for table in ranking(cells)] == [
        "Ranking: math-code · mini · budget 10%",
        "Ranking: trace · mini · budget 10%",
        "Ranking: math-code · 8b · budget 10%",
        "Ranking: math-code · mini · budget 5%",
    ]
    assert [row[0] for row in ranking(cells)[0].rows] == ["graftllm", "lora"]


def test_two_orders_of_the_same_tasks_are_not_mixed() -> None:
    cells = [cell(), cell(tasks=["code", "math"], seed=1)]
    assert list(groups(cells)) == [
        "math-code · mini · budget 10% · math → code",
        "math-code · mini · budget 10% · code → math",
    ]


def test_the_same_seed_twice_is_refused() -> None:
    with pytest.raises(ReportError, match="seed 0 of graftllm occurs twice in math-code") as caught:
        ranking([cell(), cell()])
    assert isinstance(caught.value, CLGraftError)


def plugin(path: str, label: str = "mine", **changes: Any) -> dict[str, Any]:
    config = {"scenario": "math-code", "strategy": path}
    return cell(label, strategy="mine", config=config, **changes)


def test_plugins_of_one_name_are_told_apart_by_their_folders() -> None:
    """As `RunConfig.cell` tells them; a cell that is there twice is still refused."""
    cells = [plugin("x/a/mine.py"), plugin("x/b/mine.py"), plugin("x/b/mine.py", seed=1)]
    assert [(line.name, len(line.cells)) for line in lines_of(cells)] == [
        ("a/mine", 1),
        ("b/mine", 2),
    ]
    told = told_apart(cells)
    some = [plugin(f"{path}/mine.py") for path in ("x/a/b", "x/c/b", "x/d")] + [plugin("mine")]
    deep = told_apart(some)
    assert [c["label"] for c in deep] == ["a/b/mine", "c/b/mine", "x/d/mine", "mine"]
    for cells in (told, deep, deep[1:], deep[2:]):  # what was told apart stays as it is
        assert all(one is other for one, other in zip(cells, told_apart(cells), strict=True))
    (mine, _) = told_apart([plugin("a/mine.py", label="mine(rank=8)"), plugin("b/mine.py")])
    assert mine["label"] == "a/mine(rank=8)"
    assert [line.name for line in lines_of([plugin("mine"), plugin("x/mine.py")])] == [
        "mine",
        "x/mine",
    ]
    assert [line.name for line in lines_of([plugin("x/a/mine.py")])] == ["mine"]
    with pytest.raises(ReportError, match="seed 0 of mine occurs twice"):
        lines_of([plugin("mine.py"), plugin("mine.py")])


def test_series_are_of_one_group() -> None:
    with pytest.raises(ReportError, match="are of 2 groups"):
        lines_of([cell(), cell(model="8b")])
    with pytest.raises(ReportError, match="there are no cells"):
        lines_of([])


def test_no_cells_make_no_tables(tmp_path: Path) -> None:
    assert ranking([]) == matrices([]) == write_tables([], tmp_path) == []


# --- matrices ---------------------------------------------------------------------------------


def test_a_forgetting_matrix_has_a_row_per_stage() -> None:
    half = [[None if x is None else x / 2 for x in row] for row in FORGETS]
    (table,) = matrices([cell(seed=0, general=None), cell(matrix=half, seed=1, general=None)])
    assert table.title == "math-code · mini · budget 10%: graftllm"
    assert table.columns == ("Experience", "math", "code", "±")
    assert table.rows == (
        ("base", "15.0 ± 0.7", "22.5 ± 0.7", "examples"),
        ("after math", "60.0 ± 20.0", "22.5 ± 7.5", "seeds"),
        ("after code", "45.0 ± 15.0", "52.5 ± 17.5", "seeds"),
    )


def test_the_base_is_one_model_whose_error_is_over_test_examples() -> None:
    """Seeds on the same examples have its error once; on examples of their own, that of the mean of independent ones."""
    wrong_once: Rows = [[0.2, 0.4], *FORGETS[1:]]
    same, apart = (
        matrices([cell(seed=0), cell(seed=1)]),
        matrices([cell(), cell("lora"), cell("lora", wrong_once, seed=1)]),
    )
    assert same[0].rows[0][:3] == ("base", "20.0 ± 1.0", "30.0 ± 1.0")
    assert apart[1].rows[0][:3] == ("base", "20.0 ± 1.0", "35.0 ± 0.7")


def test_general_ability_is_the_last_column_of_every_matrix_of_its_group() -> None:
    with_it, without = matrices([cell(), cell("lora", general=[None, None, None])])
    assert (
        with_it.columns == without.columns == ("Experience", "math", "code", "General ability", "±")
    )
    assert [row[-2] for row in with_it.rows] == ["50.0", "48.0", "47.0"]
    assert [row[-2] for row in without.rows] == ["–", "–", "–"]
    (alone,) = matrices([cell("lora", general=[None, None, None])])
    assert alone.columns == ("Experience", "math", "code", "±")


def test_the_matrix_of_an_incomplete_cell_stands_alone() -> None:
    whole, part = matrices([half_done(seed=1), cell(seed=0)])
    assert whole.title.endswith(": graftllm")
    assert part.title.endswith(": graftllm (incomplete: seed 1, 1 of 2 tasks)")
    assert part.rows[1] == ("after math", "90.0 ± 1.0", "90.0 ± 1.0", "40.0", "examples")
    assert part.rows[2][:-1] == ("after code", "–", "–", "–")


def test_other_metrics_follow_in_their_own_unit() -> None:
    tokens: Rows = [[10.0, 12.0], [31.5, 12.0], [30.0, None]]
    main, extra = matrices([cell(extra_matrices={"answer_length": tokens})])
    assert main.title.endswith(": graftllm")
    assert extra.title.endswith(": graftllm, answer_length")
    assert extra.rows == (
        ("base", "10.000", "12.000", ""),
        ("after math", "31.500", "12.000", "examples"),
        ("after code", "30.000", "–", "examples"),
    )


# --- a table as text --------------------------------------------------------------------------

TABLE = Table(
    "Two | one",
    ("Strategy", "a|b", "Bytes"),
    (("lora[r=8]", "70.0 ± 1.5", "1,234,567"), ("x, y", "–", "12")),
    note="A note.",
)


def test_markdown() -> None:
    assert TABLE.markdown() == (
        "### Two | one\n\n"
        "| Strategy | a\\|b | Bytes |\n"
        "|:--|--:|--:|\n"
        "| lora[r=8] | 70.0 ± 1.5 | 1,234,567 |\n"
        "| x, y | – | 12 |\n\n"
        "A note."
    )


def test_csv_is_for_programs() -> None:
    assert TABLE.csv() == ('Strategy,a|b,a|b s.e.,Bytes\nlora[r=8],70.0,1.5,1234567\n"x, y",,,12\n')


def test_latex_is_balanced_and_every_character_stands_for_itself() -> None:
    odd = "a_b & 50% of $x$ #1 {c} \\ ~ ^ <i> é"
    text = Table(odd, ("Strategy", odd), ((odd, "-1.5 ± 0.2"), ("[x]", "–")), note=odd).latex()
    assert text.count("\\begin{") == text.count("\\end{") == 2
    bare = re.sub(r"\\[&%$#_{}]", "", text)
    assert bare.count("{") == bare.count("}")
    assert r"a\_b \& 50\% of \$x\$ \#1 \{c\} \textbackslash{} \textasciitilde{}" in text
    rows = text[text.index(r"\midrule") : text.index(r"\bottomrule")].strip().splitlines()[1:]
    assert len(rows) == 2 and all(row.endswith(r" \\") for row in rows)
    assert all(len(re.findall(r"(?<!\\)&", row)) == 1 for row in rows)  # two columns
    assert r"& $-$1.5 $\pm$ 0.2 \\" in rows[0]
    assert rows[1] == r"{}[x] & -- \\"  # a bracket after a row's end would be its argument
    for rule in ("toprule", "midrule", "bottomrule"):
        assert text.count("\\" + rule) == 1


def test_only_a_wide_table_of_latex_is_made_smaller() -> None:
    wide = Table("", ("Strategy", *(f"task {k}" for k in range(12))), (("lora", *["70.0"] * 12),))
    assert "resizebox" not in TABLE.latex()
    text = wide.latex()
    assert r"\resizebox{\textwidth}{!}{%" in text and "\\end{tabular}}\n" in text


def test_costs_are_means_over_seeds() -> None:
    slow = {"train": 2000.0, "compress": 30.0, "evaluate": 5.0, "harness": 0.5}
    (table,) = costs(
        [cell(seed=0), cell(seed=1, seconds=slow, tokens=3000), cell("lora", seconds={})]
    )
    row = rows_of(table)["graftllm"]
    assert (row["Train s"], row["Compress s"], row["Total s"]) == ("1,617.2", "20.0", "1,642.8")
    assert (row["Tokens"], row["Peak MiB"], row["Bytes alive"]) == ("2,000", "500", "389,600")
    assert rows_of(table)["lora"]["Total s"] == "–"


def test_rich_keeps_brackets_and_prints_every_cell() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(TABLE.rich())
    text = console.export_text()
    for part in ("Two | one", "lora[r=8]", "70.0 ± 1.5", "1,234,567", "A note."):
        assert part in text, part


def test_names_that_differ_at_their_ends_are_whole_in_a_narrow_terminal() -> None:
    names = ("magnitude(task_ids=inferred)", "magnitude(task_ids=given)")
    table = Table("", ("Strategy", *"abcdef"), tuple((name, *["60.0 ± 1.0"] * 6) for name in names))
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(table.rich())
    first = [
        line.split("│")[1].strip() for line in console.export_text().splitlines() if "│" in line
    ]
    assert "".join(first) == "".join(names)


# --- all metrics ------------------------------------------------------------------------------


def test_every_metric_is_shown_with_the_error_over_seeds() -> None:
    better: Rows = [[0.2, 0.3], [0.8, 0.3], [0.7, 0.7]]
    (table,) = metrics([cell(), cell(matrix=better, seed=1), half_done(seed=3)])
    first, incomplete = (dict(zip(table.columns, row, strict=True)) for row in table.rows)
    assert list(first)[3:-1] == [name for name, m in METRICS.items() if not m.joint]
    assert (first["op"], first["bwt"], first["fm"]) == ("67.5 ± 2.5", "-15.0 ± 5.0", "15.0 ± 5.0")
    assert set(incomplete.values()) == {
        incomplete["Strategy"],
        "not needed",
        "10%",
        "–",
        "examples",
    }
    assert "Lower is better of fm, avalanche_forgetting" in table.note


# --- files ------------------------------------------------------------------------------------


def test_written_tables_hold_what_was_printed(tmp_path: Path) -> None:
    cells = [cell(extra_matrices={"exact": FORGETS}), cell("lora(rank=8)"), half_done(seed=3)]
    paths = write_tables(cells, tmp_path / "report")
    stem = "math-code-mini-budget-10pct"
    names = [f"{stem}-{name}" for name in ("ranking", "metrics", "costs", "tasks", "matrices")]
    files = [f"{name}.{end}" for name in (*names, "cells-table") for end in ("md", "csv", "tex")]
    assert paths == [tmp_path / "report" / file for file in files]
    assert sorted((tmp_path / "report").iterdir()) == sorted(paths)  # no temporary file is left
    assert paths[0].read_text() == ranking(cells)[0].markdown() + "\n"
    for table in matrices(cells):
        assert table.markdown() in paths[12].read_text()

    with paths[1].open(newline="") as file:
        rank = list(csv.DictReader(file))
    assert float(rank[0]["math"]) == 60.0
    assert float(rank[0]["math s.e."]) == 1.0
    assert int(rank[0]["Bytes alive"]) == 389_600

    with paths[10].open(newline="") as file:
        (task, *_) = csv.DictReader(file)
    assert (task["math base"], task["math learned"], task["math end"]) == (
        "20.0000",
        "80.0000",
        "60.0000",
    )
    assert task["math Δ"] == "-20.0000"

    with paths[16].open(newline="") as file:
        listed = list(csv.DictReader(file))
    assert [(c["Strategy"], c["Seed"], c["OP"], c["Experiences"], c["Of"]) for c in listed] == [
        ("graftllm", "0", "65.0000", "3", "3"),
        ("lora(rank=8)", "0", "65.0000", "3", "3"),
        ("graftllm", "3", "", "2", "3"),
    ]

    with paths[13].open(newline="") as file:
        experiences = list(csv.DictReader(file))
    assert len(experiences) == 4 * 3  # graftllm, its exact match, lora and the incomplete cell
    assert {None} == {row.get(None) for row in experiences}  # every row fits the header
    last = [row for row in experiences if row["Matrix"].endswith(": lora(rank=8)")][-1]
    assert (last["Experience"], last["math"], last["General ability"]) == (
        "after code",
        "60.0000",
        "47.0000",
    )


def test_groups_never_share_a_file(tmp_path: Path) -> None:
    cells = [cell(model=model) for model in ("a/b", "a-b", "A b")]
    paths = write_tables(cells, tmp_path)
    assert len(paths) == 3 * 5 * 3 + 3
    assert len({str(path).lower() for path in paths}) == len(paths)
    assert all(path.parent == tmp_path for path in paths)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "table.md"
    write_atomic(path, b"old")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomic(tmp_path / "taken", b"a folder is in the way")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "taken"]


def test_a_matrix_says_which_scores_were_measured_by_another_row_or_cell() -> None:
    """Only what no seed of the label measured again is told."""
    one = cell(seed=0, identical=[[True, True], [False, True], [True, False]])
    two = cell(seed=1, identical=[[True, True], [False, False], [True, False]])
    (table,) = (t for t in matrices([one, two]))
    assert table.note.endswith("of weights: base (math, code); after code (math).")
    assert "Measured once" not in matrices([cell()])[0].note
