"""What reports say of protocols, routers and bytes: which task a prompt was taken for, and what that costs."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from cl_graft.bench.report import make
from cl_graft.config import RunConfig
from cl_graft.report import budgets, find, page
from cl_graft.report.aggregate import ReportError, lines_of
from cl_graft.report.figures import curves, draw, figures_of, routing
from cl_graft.report.protocols import protocol
from cl_graft.report.routing import accuracy, confusion_csv, confusion_tables, confusions, routed
from cl_graft.report.significance import ranked_lines, reader, table
from cl_graft.report.tables import (
    all_cells,
    by_task,
    costs,
    matrices,
    metrics,
    ranking,
    write_tables,
)
from cl_graft.store.result import collect, kept
from tests.command import Call
from tests.report.test_colours import luminance
from tests.report.test_figures import panels, shown, shown_text, texts
from tests.report.test_tables import cell, rows_of

# of 10 test examples of math and 10 of code; 4 prompts of general ability; code is yet to be learned at first
ROUTES = [
    {"math": {"": 10}, "code": {"": 10}, "general": {"": 4}},
    {"math": {"math": 9, "": 1}, "code": {"math": 10}, "general": {"math": 4}},
    {"math": {"math": 7, "code": 3}, "code": {"code": 8, "math": 1, "": 1}, "general": {"code": 4}},
]
GIVEN = [
    {"math": {"": 10}, "code": {"": 10}},
    {"math": {"math": 10}, "code": {"": 10}},
    {"math": {"math": 10}, "code": {"code": 10}},
]


def told(label: str = "graftllm", **changes: Any) -> dict[str, Any]:
    """A cell whose method is told the task."""
    return cell(
        label,
        **({"config": {"scenario": "math-code", "strategy": label}, "routing": GIVEN} | changes),
    )


def inferred(label: str = "graftllm(task_ids=inferred)", **changes: Any) -> dict[str, Any]:
    config = {"scenario": "math-code", "strategy": "graftllm", "task_ids": "inferred"}
    found = {"config": config, "routing": ROUTES, "routing_accuracy": [None, 0.9, 0.75]}
    return cell(label, **(found | changes))


# --- what a cell records ----------------------------------------------------------------------


def record(folder: Path, **changes: Any) -> None:
    """Change every experience of the only cell in the folder; a value is a list over experiences."""
    (path,) = (p.parent for p in folder.glob("*/cell.json"))
    for file in path.glob("experiences/*/experience.json"):
        one = json.loads(file.read_text())
        one |= {key: values[one["experience"]] for key, values in changes.items()}
        file.write_text(json.dumps(one))


def only(folder: Path, strategy: str) -> Path:
    """The cell of this strategy that `make` leaves among the first three that it knows, alone."""
    make(folder, cells=2, examples=4, strategies=2, scenarios=1)
    for file in list(folder.glob("*/cell.json")):
        if f"__{strategy}__" not in file.parent.name:
            file.parent.rename(folder.parent / f"{folder.name}-other")
    (path,) = (p.parent for p in folder.glob("*/cell.json"))
    return path


def test_accuracy_is_over_the_test_examples_of_the_tasks_seen_so_far(tmp_path: Path) -> None:
    """math 3 of 4; math and code 2 + 3 of 8; all three 4 + 2 + 1 of 12. General prompts never count."""
    path = only(tmp_path / "a", "lora")
    general = {"general": {"math": 5}}
    routes = [
        {"math": {"": 4}, "code": {"": 4}, "cipher": {"": 4}} | general,
        {"math": {"math": 3, "": 1}, "code": {"math": 4}, "cipher": {"math": 4}} | general,
        {"math": {"math": 2, "code": 2}, "code": {"code": 3, "math": 1}, "cipher": {"code": 4}}
        | general,
        {"math": {"math": 4}, "code": {"code": 2, "cipher": 2}, "cipher": {"cipher": 1, "": 3}}
        | general,
    ]
    record(tmp_path / "a", routing=routes)
    assert collect(path)["routing_accuracy"] == [None, 0.75, 5 / 8, 7 / 12]


def test_nothing_is_inferred_where_the_task_is_given_or_not_needed(tmp_path: Path) -> None:
    path = only(tmp_path / "a", "graftllm")
    assert collect(path)["routing"][-1]["math"] == {"math": 4}
    assert collect(path)["routing_accuracy"] == [None] * 4
    path = only(tmp_path / "b", "lora")
    record(tmp_path / "b", routing=[{"math": {}, "code": {}, "cipher": {}}] * 4)
    assert collect(path)["routing_accuracy"] == [None] * 4
    assert protocol(collect(path)) == "not needed"


def test_a_result_that_says_nothing_of_budgets_is_made_again_from_the_records(
    tmp_path: Path, call: Call
) -> None:
    path = only(tmp_path / "a", "lora")
    whole = json.loads((path / "result.json").read_text())
    del (left := dict(whole))["budgeted"]
    (path / "result.json").write_text(json.dumps(left))
    assert kept(path) is None
    done = call("report", str(tmp_path / "a"), "--json")
    (printed,) = json.loads(f"[{done.out}]") if done.out.startswith("{") else json.loads(done.out)
    assert printed["budgeted"] and printed["routing_accuracy"] == whole["routing_accuracy"]
    assert printed["routing_accuracy"][0] is None and len(printed["routing_accuracy"]) == 4


# --- protocols --------------------------------------------------------------------------------


def test_a_protocol_is_told_from_what_a_cell_recorded() -> None:
    assert protocol(cell()) == "not needed"
    assert protocol(told()) == "given"
    assert protocol(inferred()) == "inferred (ridge)"
    config = inferred()["config"]
    assert protocol(inferred(config=config | {"router": "centroids"})) == "inferred (centroids)"
    assert protocol(inferred(config=config | {"router": "x/mine.py"})) == "inferred (mine)"
    assert (
        protocol(cell(config=config)) == "not needed"
    )  # a router has nothing to say to such a method
    assert protocol(cell(routing=[])) == "–"  # nothing was answered yet


def test_every_table_with_scores_says_which_protocol_a_row_is_of() -> None:
    cells = [cell("sequential"), told(), inferred()]
    expected = {
        "sequential": "not needed",
        "graftllm": "given",
        "graftllm(task_ids=inferred)": "inferred (ridge)",
    }
    small = [c | {"budget": "5%", "budget_bytes": 100_000} for c in cells]
    ((title, members),) = budgets.groups([*cells, *small]).items()
    made = [*ranking(cells), *metrics(cells), *by_task(cells), all_cells(cells)]
    made.append(budgets.table(title, members))
    for one in made:
        assert {n: row["Task IDs"] for n, row in rows_of(one).items()} == expected, one.title
        assert "compare like with like" in one.note, one.title
    assert {n: row["Task IDs"] for n, row in rows_of(costs(cells)[0]).items()} == expected
    titles = [grid.title for grid in matrices(cells)]
    assert titles[0].endswith(": sequential")
    assert titles[2].endswith(": graftllm, told the task")
    assert titles[1].endswith(": graftllm(task_ids=inferred)")
    legend = [t.get_text() for t in curves(cells).legends[0].get_texts()]
    assert "graftllm, told the task" in legend and "sequential" in legend


def test_intervals_say_it_too(tmp_path: Path) -> None:
    make(tmp_path, cells=3, examples=4, strategies=3, scenarios=1)
    rows = rows_of(table("", ranked_lines(find([tmp_path]), reader())))
    assert {name: row["Task IDs"] for name, row in rows.items()} == {
        "graftllm": "given",
        "lora(task_ids=inferred)": "inferred (ridge)",
        "model_grafting": "not needed",
    }


# --- bytes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("alive", "shared", "shown"),
    [
        # three tasks, packs of 100,000, base of 2,000,000 bytes
        ([100_000, 200_000, 300_000], {}, ("5.00", "300,000")),  # a pack a task
        ([100_000, 100_000, 100_000], {}, ("1.67", "100,000")),  # the last pack answers for all
        ([130_000, 230_000, 330_000], {"fisher": 30_000}, ("5.50", "330,000")),
    ],
    ids=["per_task", "latest", "shared"],
)
def test_bytes_are_what_is_alive_after_the_last_task(alive: Any, shared: Any, shown: Any) -> None:
    scores = [[0.2] * 3, [0.3] * 3, [0.4] * 3, [0.5] * 3]
    one = cell(
        matrix=scores,
        tasks=["a", "b", "c"],
        pack_bytes=[100_000] * 3,
        alive_bytes=alive,
        shared_bytes=shared,
    )
    row = rows_of(ranking([one])[0])["graftllm"]
    assert (row["Storage %"], row["Bytes alive"], row["Largest pack"]) == (*shown, "100,000")
    row = rows_of(costs([one])[0])["graftllm"]
    assert (row["Bytes alive"], row["Largest pack"]) == (shown[1], "100,000")
    (line,) = lines_of([one])
    (ax,) = panels(figures_of([one])["bytes-vs-score"]([one]))
    ((x, _),) = ax.containers[0].lines[0].get_xydata()
    assert x == pytest.approx(line.storage()) == pytest.approx(alive[-1] / 3 / 20_000)


# --- routing ----------------------------------------------------------------------------------


def test_routing_is_a_column_of_the_ranking_where_any_cell_has_it() -> None:
    (made,) = ranking([told(), inferred(), inferred(seed=1, routing_accuracy=[None, 0.9, 0.85])])
    rows = rows_of(made)
    assert rows["graftllm(task_ids=inferred)"]["Routing"] == "80.0 ± 5.0"
    assert rows["graftllm"]["Routing"] == "–"
    assert "Routing" not in ranking([told()])[0].columns


def test_accuracy_by_experience() -> None:
    (made,) = accuracy([told(), inferred(), inferred(seed=1, routing_accuracy=[None, 0.7, 0.75])])
    assert made.columns == ("Strategy", "Task IDs", "Budget", "after math", "after code")
    assert made.rows == (
        ("graftllm(task_ids=inferred)", "inferred (ridge)", "10%", "80.0 ± 10.0", "75.0 ± 0.0"),
    )
    assert accuracy([told(), cell("sequential")]) == []


def test_a_confusion_counts_what_was_taken_for_what_at_the_end() -> None:
    (found,) = confusions(routed([told(), inferred(), inferred(seed=1)]))
    assert found.name == "graftllm(task_ids=inferred)"
    assert found.of == ("math", "code", "general")
    assert found.taken_for == ("math", "code", "base model")
    np.testing.assert_array_equal(found.counts, [[14, 6, 0], [2, 16, 2], [0, 8, 0]])  # two seeds
    np.testing.assert_allclose(found.shares, [[0.7, 0.3, 0], [0.1, 0.8, 0.1], [0, 1, 0]])


def test_general_prompts_and_the_base_are_left_out_where_there_are_none() -> None:
    routes = [*GIVEN[:2], {"math": {"math": 4}, "code": {"math": 3, "code": 1}}]
    (grid,) = confusion_tables([inferred(routing=routes)])
    assert grid.columns == ("Prompts of", "math", "code")
    assert grid.rows == (("math", "4 (100.0 %)", "0 (0.0 %)"), ("code", "3 (75.0 %)", "1 (25.0 %)"))


def test_confusions_of_a_group_have_the_same_rows_and_columns() -> None:
    routes = [*GIVEN[:2], {"math": {"math": 4}, "code": {"math": 3, "code": 1}}]
    one, other = confusions(
        routed([inferred(), inferred("ties(task_ids=inferred)", routing=routes)])
    )
    assert (one.of, one.taken_for) == (other.of, other.taken_for)
    assert np.isnan(other.shares[2]).all()  # no general prompt was asked of it
    _, grid = confusion_tables([inferred(), inferred("ties(task_ids=inferred)", routing=routes)])
    assert grid.rows[-1] == ("general", "–", "–", "–")


def test_files_of_routing(tmp_path: Path) -> None:
    cells = [told(), inferred()]
    names = {
        p.name.removeprefix("math-code-mini-budget-10pct-") for p in write_tables(cells, tmp_path)
    }
    assert {f"{n}.{e}" for n in ("routing", "confusion") for e in ("md", "csv", "tex")} <= names
    read = list(csv.DictReader(confusion_csv(cells).splitlines()))
    assert len(read) == 3 * 3
    assert read[1] == {
        "Strategy": "graftllm(task_ids=inferred)",
        "Prompts of": "math",
        "Taken for": "code",
        "Examples": "3",
        "Per cent": "30.0000",
    }
    stem = tmp_path / "math-code-mini-budget-10pct-confusion"
    assert "| code | 1 (10.0 %) | 8 (80.0 %) | 1 (10.0 %) |" in stem.with_suffix(".md").read_text()
    tex = stem.with_suffix(".tex").read_text()
    assert r"code & 1 (10.0 \%) & 8 (80.0 \%) & 1 (10.0 \%) \\" in tex
    without = write_tables([told()], tmp_path / "without")
    assert not [p for p in without if "routing" in p.name or "confusion" in p.name]


# --- figure -----------------------------------------------------------------------------------


def test_the_figure_shows_shares_of_rows_and_frames_what_is_right() -> None:
    (ax,) = panels(routing([told(), inferred(), inferred("ties(task_ids=inferred)")]))
    names = [t.get_text().replace("\n", "") for t in texts(ax, "name")]
    assert names == ["graftllm(task_ids=inferred)", "ties(task_ids=inferred)"]
    np.testing.assert_allclose(shown(ax)[:, :3], [[70, 30, 0], [10, 80, 10], [0, 100, 0]])
    framed = {p.get_xy() for p in ax.patches if isinstance(p, Rectangle) and not p.get_fill()}
    assert {xy for xy in framed if xy[0] < 3} == {
        (0, 0),
        (1, 1),
    }  # no answer is right of general
    assert [t.get_text() for t in ax.get_yticklabels()] == ["math", "code", "general"]
    assert [t.get_text() for t in ax.get_xticklabels()][:3] == ["math", "code", "base model"]


def test_every_share_can_be_read_on_its_colour_and_no_text_is_covered() -> None:
    tasks = list("abcde")
    routes = {
        t: {u: 1 + 5 * (i == j) + i * j for j, u in enumerate(tasks)} for i, t in enumerate(tasks)
    }
    made = inferred(
        matrix=[[0.5] * 5] * 6, tasks=tasks, routing=[routes] * 6, routing_accuracy=[0.5] * 6
    )
    figure = routing([made, made | {"label": "ties(router=centroids, task_ids=inferred)"}])
    figure.draw_without_rendering()
    (ax,) = panels(figure)
    for text in texts(ax, "score"):
        colour = ax.collections[0].to_rgba(float(text.get_text()))
        light, dark = sorted((luminance(text.get_color()), luminance(to_rgb(colour))), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, text.get_text()
    page = figure.bbox.padded(1.0)
    boxes = [(t, t.get_window_extent()) for t in shown_text(figure)]
    boxes = [(t, box) for t, box in boxes if t.get_rotation() in (0.0, 90.0)]
    for k, (one, a) in enumerate(boxes):
        assert page.x0 <= a.x0 <= a.x1 <= page.x1 and page.y0 <= a.y0 <= a.y1 <= page.y1, one
        for other, b in boxes[k + 1 :]:
            assert not a.padded(-1.0).overlaps(b.padded(-1.0)), (one.get_text(), other.get_text())


def test_a_figure_of_routing_is_drawn_only_where_there_is_routing(tmp_path: Path) -> None:
    assert "routing" not in figures_of([told(), cell("sequential")])
    with pytest.raises(ReportError, match="no task was inferred"):
        routing([told()])
    assert "routing" in figures_of([inferred()])
    written = [p.name for p in draw("routing", [inferred()], tmp_path / "routing")]
    assert written == [f"routing.{end}" for end in ("png", "svg", "svg")]


def test_a_method_that_is_told_and_one_that_infers_share_no_file(tmp_path: Path) -> None:
    """One strategy by both protocols, in folders as runs name them: two lines, two pages."""
    path = only(tmp_path / "a", "lora")
    (path / "result.json").unlink()
    for field in ({}, {"task_ids": "inferred"}):
        config = RunConfig(scenario="synthetic-0", strategy="lora", **field)
        shutil.copytree(path, tmp_path / "both" / config.cell)
        about = json.loads((path / "cell.json").read_text()) | {"config": config.experiment()}
        (tmp_path / "both" / config.cell / "cell.json").write_text(json.dumps(about))
    found = find([tmp_path / "both"])
    assert sorted(f.cell["label"] for f in found) == ["lora", "lora(task_ids=inferred)"]
    page.write(found, tmp_path / "report")
    pages = {p.stem for p in (tmp_path / "report" / "cells").iterdir()}
    assert pages == {"lora", "lora-task-ids-inferred"}
