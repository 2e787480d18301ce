"""Figures for papers: what is drawn, who is named, and whether it can be read at its printed size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_graft.matrix import PerformanceMatrix
from cl_graft.report.overview import Standing
from cl_graft.report.paper import chosen
from cl_graft.report.paper.chosen import panels
from cl_graft.report.paper.confusion import confusion
from cl_graft.report.paper.critical import MOST, bars, critical
from cl_graft.report.paper.curves import along, apart, curves
from cl_graft.report.paper.drift import drift
from cl_graft.report.paper.plasticity import learned, lost, plasticity
from cl_graft.report.paper.sheet import Drawn
from cl_graft.report.paper.standing import Scores, standing
from cl_graft.report.paper.storage import storage
from cl_graft.report.protocols import FREE, GIVEN, TOLD, UNTOLD, protocol
from cl_graft.report.ranks import Ranks
from cl_graft.report.statistics import Interval
from cl_graft.report.style import KNOWN
from tests.report.test_tables import cell

TASKS = ["math", "code", "cipher_of_caesar"]
Rows = list[list[float | None]]


def crowd(count: int = 14, seeds: int = 2, budgets: tuple[str, ...] = ("10%",)) -> list[Any]:
    """So many strategies that are told the task, as many that infer it, and as many that need not know; references."""
    rng, made = np.random.default_rng(0), []
    names = [*(n for n in KNOWN if n not in chosen.ALWAYS), *(f"plugin_{k}" for k in range(40))]
    kinds = [("told", n) for n in names[:count]] + [("inferred", n) for n in names[:count]]
    kinds += [("one", n) for n in (*names[count : 2 * count], "sequential", "joint")]
    kinds += [("told", "individual")]
    for (kind, name), budget in itertools.product(kinds, budgets):
        size = {"10%": 200_000, "1%": 20_000}[budget]
        for seed in range(seeds):
            rows = rng.uniform(0.2, 0.9, (4, 3))
            if kind == "told":
                rows = np.vstack([rows[0], np.tril(np.tile(rows[1], (3, 1)))])
            right = {t: {t: 9, TASKS[0]: 1} for t in TASKS}
            taken = {"one": {t: {} for t in TASKS}, "told": {t: {t: 10} for t in TASKS}}
            config = {"scenario": "s", "strategy": name}
            config |= {"task_ids": "inferred"} if kind == "inferred" else {}
            made.append(
                cell(
                    f"{name}(task_ids=inferred)" if kind == "inferred" else name,
                    rows.tolist(),
                    tasks=TASKS,
                    seed=seed,
                    scenario="a_scenario",
                    config=config,
                    budget=budget,
                    budget_bytes=size,
                    budgeted=name not in chosen.ALWAYS,
                    strategy=name,
                    alive_bytes=[int(size * 3 * rng.uniform(0.3, 1.0))] * 3,
                    general=[0.7, *rng.uniform(0.2, 0.7, 3).tolist()],
                    routing=[taken.get(kind, right)] * 4,
                    routing_accuracy=[None, *([0.9] * 3 if kind == "inferred" else [None] * 3)],
                    kl_to_base=[
                        {way: {"value": x, "stderr": 0.1} for way in ("forward", "reverse")}
                        for x in rng.uniform(0.1, 3.0, 3).tolist()
                    ],
                )
            )
    return made


CROWD = crowd()
FEW = crowd(2)
UNTOLD_ALONE = [c for c in crowd(8, 1) if protocol(c) != GIVEN]


def positions(count: int, blocks: int = 6) -> dict[str, Ranks]:
    """Ranks of so many strategies of each kind, evenly apart."""
    names = tuple(f"strategy_{k}" for k in range(count))
    block = tuple((f"s{k}", ("t",), "m") for k in range(blocks))
    ranks = tuple(float(k) for k in range(1, count + 1))
    tested = (0.001, 3.0) if blocks >= 5 else (float("nan"), float("nan"))
    return {part: Ranks(names, ranks, block, (), *tested) for part in (UNTOLD, TOLD)}


def table_of(count: int, columns: int) -> Scores:
    ranks = positions(count)
    scores = [Interval(0.1 * k, float("nan"), float("nan")) for k in range(columns)]
    rows = [Standing("", ("base model", "", ""), scores)]
    for part in (UNTOLD, TOLD):
        rows += [Standing(part, (n, "", ""), scores) for n in ranks[part].names]
        rows += [Standing(part + FREE, ("sequential", "", ""), scores)]
    names = tuple(f"scenario_number_{k}" for k in range(columns))
    return Scores("OP by scenario.", names, rows, ranks)


DRAWN: dict[str, Callable[[str], Drawn | None]] = {
    "curves": functools.partial(curves, CROWD),
    "plasticity": functools.partial(plasticity, CROWD),
    "bytes": functools.partial(storage, CROWD),
    "kl": functools.partial(drift, UNTOLD_ALONE),
    "routing": functools.partial(confusion, CROWD),
    "ranks": functools.partial(critical, positions(22)),
    "overview": functools.partial(standing, table_of(20, 6)),
    "curves of few": functools.partial(curves, FEW),
    "overview of many": functools.partial(standing, table_of(20, 16)),
    "overview of one": functools.partial(standing, table_of(3, 1)),
    "ranks of few": functools.partial(critical, positions(3)),
}


@functools.cache
def drawn(name: str, width: str) -> Drawn:
    found = DRAWN[name](width)
    assert found
    return found


# --- what is drawn ----------------------------------------------------------------------------

ROWS: Rows = [[0.2, 0.3], [0.8, 0.3], [0.6, 0.7]]


def test_a_curve_is_the_mean_of_the_tasks_learned_so_far_with_its_error() -> None:
    two = [cell(matrix=ROWS), cell(matrix=[[0.2, 0.3], [0.6, 0.3], [0.4, 0.5]], seed=1)]
    (panel,) = panels(two)
    mean, se = along(panel.lines[0])
    assert mean.tolist() == pytest.approx([0.7, 0.55])  # .8 and .6; .65 and .45
    assert se.tolist() == pytest.approx([0.1, 0.1])
    (one,) = panels(two[:1])
    assert along(one.lines[0])[1].tolist() == pytest.approx([0.01, 0.01 / 2**0.5])
    (ax,) = curves(two, "1col").figure.axes
    line = next(line for line in ax.lines if line.get_marker() != "None")
    assert line.get_xydata().tolist() == [[1, pytest.approx(70)], [2, pytest.approx(55)]]
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (pytest.approx(45), pytest.approx(80))
    assert [t.get_text() for t in ax.texts] == ["graftllm"]


def test_curves_that_hide_each_other_are_named_in_the_caption() -> None:
    cells = [cell("lora"), cell("svd"), cell("ties", [[0.2, 0.3], [0.9, 0.3], [0.9, 0.9]])]
    assert "In one place: lora, svd." in curves(cells, "1col").caption


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0.01, 0.12))
def test_names_beside_curves_keep_their_order_and_distance(
    places: list[float], least: float
) -> None:
    moved = apart(places, least)
    order = sorted(range(len(places)), key=lambda k: places[k])
    for a, b in itertools.pairwise(order):
        assert moved[b] - moved[a] >= least - 1e-9
    assert all(-1e-9 <= y <= 1 + 1e-9 for y in moved)
    if all(b - a >= least for a, b in itertools.pairwise(sorted(places))):
        assert moved == pytest.approx(places)


def test_names_that_are_too_near_are_set_around_their_middle() -> None:
    assert apart([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert apart([0.0, 0.02, 0.9], 0.1) == pytest.approx([0.0, 0.1, 0.9])
    assert apart([1.0, 0.99], 0.1) == pytest.approx([1.0, 0.9])


def test_what_was_learned_and_lost_lies_on_the_line_of_its_final_score() -> None:
    """OP is what was learned less (T - 1) / T of what was lost since: here 75 less half of 20."""
    figure = plasticity(
        [cell(matrix=ROWS), cell("ewc", [[0.2, 0.3], [0.9, 0.3], [0.5, 0.9]])], "1col"
    )
    assert figure
    (ax,) = figure.figure.axes
    points = [c.lines[0].get_xydata()[0].tolist() for c in ax.containers]
    assert sorted(points) == [
        [pytest.approx(75), pytest.approx(20)],
        [pytest.approx(90), pytest.approx(40)],
    ]
    dotted = {}
    for line in ax.lines:
        if line.get_linestyle() == ":":
            (x0, y0), (x1, y1) = line.get_xydata()
            assert (y1 - y0) / (x1 - x0) == pytest.approx(2)
            dotted[round(x0 - y0 / 2, 6)] = line
    assert 70 in dotted  # of ewc: 50 and 90
    marks = {float(t.get_text().removeprefix("OP ")) for t in ax.texts}
    assert marks <= set(dotted) and marks


@given(st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=4, max_size=4))
def test_of_any_matrix(rows: Any) -> None:
    (panel,) = panels([cell(matrix=rows, tasks=["a", "b", "c"])])
    (line,) = panel.lines
    op = PerformanceMatrix(rows, ["a", "b", "c"]).op()
    assert learned(line)[0] - 2 / 3 * lost(line)[0] == pytest.approx(op)


def test_where_nothing_was_lost_or_measured_there_is_nothing_to_draw() -> None:
    kept: Rows = [[0.2, 0.3], [0.8, 0.3], [0.8, 0.7]]
    assert plasticity([cell(matrix=kept)], "1col") is None
    assert drift([cell()], "1col") is None
    assert confusion([cell()], "1col") is None
    assert storage([cell(alive_bytes=[0, 0])], "1col") is None
    assert critical(positions(5, blocks=1), "1col") is None


def test_points_of_a_strategy_are_joined_over_budgets_and_what_has_none_is_there_once() -> None:
    def at(label: str, budget: str, op: float, alive: int, **more: Any) -> dict[str, Any]:
        rows: Rows = [[0.1, 0.1], [op, 0.1], [op, op]]
        size = {"10%": 200_000, "1%": 20_000}[budget]
        return cell(label, rows, budget=budget, budget_bytes=size, alive_bytes=[alive] * 2, **more)

    cells = [at("lora", "1%", 0.4, 40_000), at("lora", "10%", 0.6, 400_000)]
    cells += [at("joint", b, 0.9, 4_000_000, budgeted=False) for b in ("1%", "10%")]
    found = storage(cells, "1col")
    assert found
    (ax,) = found.figure.axes
    places = {len(c.lines[0].get_xdata()): c.lines[0].get_xydata().tolist() for c in ax.containers}
    assert places == {
        2: [[pytest.approx(1), pytest.approx(40)], [pytest.approx(10), pytest.approx(60)]],
        1: [[pytest.approx(100), pytest.approx(90)]],
    }
    assert {t.get_text() for t in ax.texts} == {"1%", "10%"}


def test_routers_that_chose_alike_share_a_grid() -> None:
    figure = drawn("routing", "1col").figure
    (ax,) = figure.axes
    assert ax.get_title().replace("\n", " ").endswith("and 13 more")
    written = [t.get_text() for t in ax.texts]
    assert written == ["100", "0", "0", "10", "90", "0", "10", "0", "90"]
    assert "Taken alike: " in drawn("routing", "1col").caption


def test_ranks_have_their_names_and_the_bars_of_what_is_not_told_apart() -> None:
    assert len(bars(positions(3)[TOLD])) == 1
    assert len(bars(positions(7)[TOLD])) == MOST
    assert bars(positions(22)[TOLD]) == [(0, 2)], "of many the best's alone: ranks 1 to 3, CD 3"
    first, second = drawn("ranks", "1col").figure.axes
    texts = [t.get_text() for t in first.texts]
    assert "CD 3.00" in texts and "strategy_0  1.0" in texts and "22.0  strategy_21" in texts
    assert "Bars" not in drawn("ranks", "1col").caption
    few = critical(positions(3, blocks=4), "1col")
    assert few and "fewer than 5 blocks" in few.caption
    assert not any(t.get_text().startswith("CD") for t in few.figure.axes[0].texts)


def test_blocks_of_one_scenario_are_said_not_to_be_independent() -> None:
    ranks = positions(3)
    assert "independent" not in (critical(ranks, "1col") or drawn("ranks", "1col")).caption
    shared = tuple(("s", (f"t{k}",), "m") for k in range(6))
    again = {p: Ranks(r.names, r.ranks, shared, (), r.p, r.critical) for p, r in ranks.items()}
    found = critical(again, "1col")
    assert found and "6 blocks (1 scenario, 6 orders of tasks)" in found.caption
    assert "which the test takes as independent" in found.caption


def test_the_overview_has_scores_and_ranks_and_leaves_out_the_lowest() -> None:
    figure = drawn("overview", "1col").figure
    first = figure.axes[0]
    names = [t.get_text() for t in first.get_yticklabels()]
    assert names == ["base model", *(f"strategy_{k}" for k in range(15)), "sequential"]
    assert "The 5 and 5 lowest are left out." in drawn("overview", "1col").caption
    written = [t.get_text() for t in first.texts]
    assert written[:6] == ["0.0", "10.0", "20.0", "30.0", "40.0", "50.0"]
    assert written[-3:] == ["14.0", "15.0", "–"]
    assert len(drawn("overview", "2col").figure.axes[0].get_yticklabels()) == 22
