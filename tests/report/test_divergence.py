"""Forgetting against KL: what was lost by hand, the rank correlation against scipy's, and what the report shows."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from cl_graft.bench.report import make
from cl_graft.report import find, write
from cl_graft.report.aggregate import lines_of
from cl_graft.report.divergence import (
    EARLIER,
    GENERAL,
    Point,
    drawable,
    files,
    kl_vs_forgetting,
    lost_earlier,
    lost_general,
    measured,
    moved,
    points,
    spearman,
    table,
)
from cl_graft.report.figures import draw, figures_of
from tests.report import test_figures
from tests.report.test_figures import panels, shown_text
from tests.report.test_routing import told
from tests.report.test_tables import cell, rows_of


def kl(forward: float, reverse: float = 0.5) -> dict[str, Any]:
    both = {"forward": forward, "reverse": reverse}
    return {
        **{way: {"value": value, "stderr": 0.01} for way, value in both.items()},
        "n": 8,
        "tokens": 40,
    }


def far(label: str, *values: float, build: Any = cell, **changes: Any) -> dict[str, Any]:
    """A cell that moved so far on each task; it lost a tenth of that in its first task and in general ability."""
    lost = [0.1 * value for value in values]
    rows = [[0.2, 0.3], [0.8, 0.3], [0.8 - lost[1], 0.7]]
    ability = [0.5, *(0.5 - x for x in lost)]
    given = {"matrix": rows, "general": ability, "kl_to_base": [kl(v) for v in values]}
    return build(label, **(given | changes))


# --- what was lost ----------------------------------------------------------------------------


def test_what_earlier_tasks_lost_since_each_was_learned() -> None:
    """After the third of three: (0.9 - 0.3 + 0.8 - 0.9) / 2 = 0.25; of unmeasured scores nothing is known."""
    rows = [[0.1, 0.2, 0.3], [0.9, 0.2, 0.3], [0.7, 0.8, 0.3], [0.3, 0.9, 0.6]]
    one = cell(matrix=rows, tasks=["a", "b", "c"])
    assert lost_earlier(one) == pytest.approx([math.nan, 0.2, 0.25], nan_ok=True)
    rows[3][1] = None  # type: ignore[call-overload]
    one = cell(matrix=rows, tasks=["a", "b", "c"])
    assert lost_earlier(one) == pytest.approx([math.nan, 0.2, math.nan], nan_ok=True)


def test_what_general_ability_lost_by_the_model_that_moved() -> None:
    """One model: as it is after each task. Packs: with the new task's on, not the mean over all."""
    assert lost_general(cell(general=[0.5, 0.4, 0.1])) == pytest.approx([0.1, 0.4])
    by_pack = [[None, None], [0.3, None], [0.3, 0.5]]
    packs = cell(general=[0.5, 0.3, 0.4], general_packs=by_pack)
    assert lost_general(packs) == pytest.approx([0.2, 0.0])
    assert np.isnan(lost_general(cell(general=None))).all()


def test_a_cell_of_an_earlier_version_is_unmeasured() -> None:
    """It has no such field, or null where a resumed cell's first tasks were learned by that version."""
    assert not measured(cell()) and np.isnan(moved(cell())).all()
    some = cell(kl_to_base=[None, kl(0.7)])
    assert measured(some) and moved(some) == pytest.approx([math.nan, 0.7], nan_ok=True)
    assert moved(cell(kl_to_base=[kl(0.7)]), "reverse").tolist()[0] == 0.5, "one task is done"


# --- rank correlation -------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=3, max_size=20))
def test_it_is_scipys_with_ties(pairs: list[tuple[int, int]]) -> None:
    found = [Point("one", k % 2, float(x), float(y)) for k, (x, y) in enumerate(pairs)]
    x, y = zip(*pairs, strict=True)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(spearman(found).mean)
    else:
        assert spearman(found).mean == pytest.approx(spearmanr(x, y).statistic)


def test_within_a_task_texts_do_not_count() -> None:
    """Of each task what moves farther loses less; the second task's text moves all farther, and it loses more."""
    found = [
        Point(name, task, x + 10 * task, -x + 10 * task)
        for name, x in (("a", 0.1), ("b", 0.2), ("c", 0.3))
        for task in (0, 1)
    ]
    assert spearman(found, within=True).mean == pytest.approx(-1.0)
    by_hand = spearmanr([p.kl for p in found], [p.lost for p in found]).statistic
    assert spearman(found).mean == pytest.approx(by_hand)
    assert by_hand > 0


def test_its_interval_draws_strategies_with_all_that_they_have() -> None:
    """However many seeds say the same, three strategies are three; of two no interval is told."""
    rng = np.random.default_rng(0)
    names = ("a", "b", "c", "d", "e")
    centres = {name: rng.normal(size=2) for name in names}
    few = [Point(n, 1, *(c + 0.01 * rng.normal(size=2))) for n, c in centres.items()]
    many = [
        Point(n, 1, *(c + 0.01 * rng.normal(size=2))) for n, c in centres.items() for _ in range(20)
    ]
    narrow, wide = spearman(many), spearman(few)
    assert narrow.high - narrow.low > 0.5 * (wide.high - wide.low)
    assert spearman(many) == spearman(many), "the same draws every time"
    two = spearman([p for p in many if p.label in "ab"])
    assert not math.isnan(two.mean) and math.isnan(two.low)


def test_an_order_that_holds_throughout_is_one_with_an_interval_of_one() -> None:
    found = [Point(str(k), 1, float(k), float(k * k)) for k in range(12)]
    rho = spearman(found)
    assert (rho.mean, rho.low, rho.high) == pytest.approx((1.0, 1.0, 1.0))


# --- the table --------------------------------------------------------------------------------

CELLS = [
    far("ewc", 0.2, 0.4),
    far("lora", 0.4, 0.8),
    far("sequential", 1.0, 2.0, seed=0),
    far("sequential", 1.2, 3.0, seed=1),
]


def test_a_row_a_label_with_the_error_over_seeds() -> None:
    (made,) = table(CELLS)
    rows = rows_of(made)
    assert rows["ewc"]["after code"] == "0.400 ± 0.010" and rows["ewc"]["±"] == "examples"
    assert rows["sequential"]["after code"] == "2.500 ± 0.500"
    assert rows["sequential"]["Mean forward"] == "1.800 ± 0.300"
    assert rows["sequential"]["Mean reverse"] == "0.500 ± 0.000"
    assert rows["sequential"]["±"] == "seeds"
    assert "nats a token" in made.note
    assert "what earlier tasks lost" in made.note and "1.00 [1.00, 1.00]" in made.note
    text = list(csv.DictReader(io.StringIO(files(CELLS)["kl.csv"])))
    assert float(text[0]["after code"]) == 0.4 and float(text[0]["after code s.e."]) == 0.01


def test_cells_that_were_not_measured_have_dashes_or_no_table() -> None:
    (made,) = table([*CELLS, cell("replay")])
    assert rows_of(made)["replay"]["Mean forward"] == "–"
    assert table([cell()]) == [] and files([cell()]) == {}


def test_those_that_are_told_the_task_are_no_part_of_the_order() -> None:
    """They forget nothing, however far they moved."""
    cells = [*CELLS, *(far(f"individual({k})", 5.0, 0.0, build=told) for k in range(3))]
    (made,) = table(cells)
    assert "not told the task 1.00 [1.00, 1.00] over all tasks" in made.note


# --- the figure -------------------------------------------------------------------------------


def placed(ax: Any) -> list[tuple[float, float]]:
    return sorted(
        (float(x), float(y))
        for line in ax.get_lines()
        for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)
    )


def test_a_point_a_seed_after_a_task() -> None:
    """Earlier tasks lost nothing before the second; general ability may from the first on."""
    earlier, ability = panels(kl_vs_forgetting(CELLS))
    expected = [(0.4, 4.0), (0.8, 8.0), (2.0, 20.0), (3.0, 30.0)]
    assert placed(earlier) == [pytest.approx(p) for p in expected]
    first = [(0.2, 2.0), (0.4, 4.0), (1.0, 10.0), (1.2, 12.0)]
    assert placed(ability) == [pytest.approx(p) for p in sorted(first + expected)]
    assert (
        "nats a token" in earlier.get_xlabel()
        and EARLIER in earlier.get_ylabel()
        and GENERAL in ability.get_ylabel()
    )
    assert len(points(lines_of(CELLS), GENERAL)) == 8


def test_the_order_stands_below_and_who_is_not_shown() -> None:
    said = " ".join(
        t.get_text().replace("\n", " ")
        for t in shown_text(kl_vs_forgetting([*CELLS, cell("replay")]))
    )
    assert "Spearman's ρ" in said and "Not shown: replay (unmeasured)." in said


@pytest.mark.parametrize("crowd", [1, 9])
def test_no_text_of_it_is_clipped_or_covered(crowd: int) -> None:
    """On a logarithmic axis, too, where the KL of some is many times that of others."""
    options = "(allocation=energy, group_size=64, calibration=256)"
    cells = [far(f"plugin_{k}{options}", 0.1 + k, 0.2 + 2 * k) for k in range(crowd)]
    test_figures.test_no_text_is_clipped_or_covered(kl_vs_forgetting, cells)
    ax = panels(kl_vs_forgetting(cells))[0]
    assert ax.get_xscale() == ("log" if crowd == 9 else "linear")
    assert not any("$" in t.get_text() for t in shown_text(kl_vs_forgetting(cells)))


def test_it_is_drawn_where_there_is_something_to_draw(tmp_path: Path) -> None:
    assert drawable(CELLS) and "kl-vs-forgetting" in figures_of(CELLS)
    assert "kl-vs-forgetting" not in figures_of([cell()])
    alone = far("ewc", 0.1, 0.2, general=None, matrix=[[0.2, 0.3], [0.8, 0.3], [None, 0.7]])
    assert not drawable([alone])
    written = draw("kl-vs-forgetting", CELLS, tmp_path / "it")
    assert [f.suffix for f in written] == [".png", ".svg", ".svg"]


def test_a_report_of_earlier_cells_and_of_new_ones(tmp_path: Path) -> None:
    """Cells without the field make the report that they made; with it there is a figure and a table more."""
    make(tmp_path, cells=2, examples=4, strategies=2, scenarios=1)
    page = write(find([tmp_path]), tmp_path / "old")
    assert "kl-vs-forgetting" not in page.read_text(encoding="utf-8")
    for file in tmp_path.glob("*/result.json"):
        result = json.loads(file.read_text())
        result["kl_to_base"] = [kl(0.1 * k) for k in (1, 2, 3)]
        file.write_text(json.dumps(result))
    page = write(find([tmp_path]), tmp_path / "new")
    text = page.read_text(encoding="utf-8")
    assert "-kl-vs-forgetting.svg" in text and "-kl.csv" in text and "KL(base ||" in text
    names = {f.name.rpartition("10pct-")[2] for f in (tmp_path / "new").iterdir()}
    assert {"kl.md", "kl.csv", "kl.tex", "kl-vs-forgetting.png", "kl-vs-forgetting.svg"} <= names
