"""Figures of a sweep: the data on the axes, and a layout in which everything can be read."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text
from PIL import Image

from cl_graft.matrix import PerformanceMatrix
from cl_graft.report import budgets
from cl_graft.report.aggregate import ReportError
from cl_graft.report.figures import BANDS, FIGURES, costs, curves, draw, heatmaps
from cl_graft.report.style import (
    KNOWN,
    darkened,
    shortened,
)
from cl_graft.report.tradeoff import bytes_vs_forgetting, bytes_vs_score, pareto
from tests.report.test_colours import luminance

Rows = list[list[float | None]]
BASE_BYTES = 2_000_000

KEEPS: Rows = [[0.2, 0.3], [0.8, 0.35], [0.75, 0.7]]
FORGETS: Rows = [[0.2, 0.3], [0.9, 0.3], [0.1, 0.8]]


def cell(label: str = "graftllm", matrix: Rows = KEEPS, **changes: Any) -> dict[str, Any]:
    """A cell as `cl-graft report --json` prints it; `pack` is in per cent of the base model."""
    tasks = changes.get("tasks", ["math", "code"])
    metrics = PerformanceMatrix(matrix, tasks=tasks).metrics()
    pack = changes.pop("pack", 10.0)
    made: dict[str, Any] = {
        "scenario": "math-code",
        "strategy": label.partition("(")[0],
        "label": label,
        "model": "mini",
        "seed": 0,
        "budget": "10%",
        "budget_bytes": BASE_BYTES // 10,
        "budgeted": True,
        "tasks": tasks,
        "matrix": matrix,
        "n": None,
        "stderr": [[None if x is None else 0.02 for x in row] for row in matrix],
        "metrics": {k: None if v != v else v for k, v in metrics.items()},
        "general": None,
        "pack_bytes": [] if pack is None else [int(BASE_BYTES * pack / 100)] * len(tasks),
        "alive_bytes": [],
        "routing": [{task: {} for task in tasks} for _ in matrix],
        "routing_accuracy": [None] * len(matrix),
        "base_bytes": BASE_BYTES,
        "seconds": {"train": 1.0},
        "extra_matrices": {},
        "identical": [[False] * len(tasks) for _ in matrix],
        "complete": True,
    }
    made["alive_bytes"] = np.cumsum(made["pack_bytes"]).tolist()  # of a method with a pack a task
    return made | changes


def panels(figure: Figure) -> list[Any]:
    """The axes with data; a colour bar is not one."""
    return [ax for ax in figure.axes if ax.get_label() != "<colorbar>"]


def shown_text(figure: Figure) -> list[Text]:
    """All text but that of ticks beyond the ends of an axis, which matplotlib keeps and hides."""
    hidden: set[Any] = set()
    for axis in [a for ax in figure.axes for a in (ax.xaxis, ax.yaxis)]:
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        hidden |= {tick.label1 for tick in ticks if not low <= tick.get_loc() <= high}
    texts: list[Any] = figure.findobj(Text)
    return [t for t in texts if t.get_visible() and t.get_text().strip() and t not in hidden]


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import cl_graft.report.figures, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)
def test_a_figure_is_of_one_scenario_model_and_budget(draw: Any) -> None:
    with pytest.raises(ReportError, match="2 groups"):
        draw([cell(), cell(budget="5%")])
    assert "math-code · mini · budget 10%" in [t.get_text() for t in shown_text(draw([cell()]))]


# --- heatmaps ---------------------------------------------------------------------------------


def texts(ax: Any, kind: str) -> list[Any]:
    """kind: score or name."""
    return [t for t in ax.texts if t.get_gid() == kind]


def shown(ax: Any) -> Any:
    """The scores by their cells, with those of the gaps between panels masked."""
    (mesh,) = ax.collections
    return mesh.get_array()


def test_heatmaps_show_the_mean_matrix_of_each_label_on_one_scale() -> None:
    other: Rows = [[0.2, 0.3], [0.6, 0.35], [0.55, 0.5]]
    cells = [cell(seed=0), cell(matrix=other, seed=1), cell("sequential", FORGETS)]
    (ax,) = panels(heatmaps(cells))
    assert [t.get_text() for t in texts(ax, "name")] == ["graftllm", "sequential"]
    np.testing.assert_allclose(shown(ax)[:, :2], [[20.0, 30.0], [70.0, 35.0], [65.0, 60.0]])
    np.testing.assert_allclose(shown(ax)[:, 3:], 100 * np.array(FORGETS, float))
    assert shown(ax).mask[:, 2].all()
    assert ax.collections[0].get_clim() == (0.0, 100.0)
    written = [t.get_text() for t in texts(ax, "score")]
    assert written[:6] == ["20.0", "30.0", "70.0", "35.0", "65.0", "60.0"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["base", "after math", "after code"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["math", "code"] * 2
    assert ax.yaxis_inverted()  # the base model on top


def test_every_number_of_many_heatmaps_is_on_its_own_cell() -> None:
    rng = np.random.default_rng(0)
    rows = {f"plugin_{k}": rng.random((3, 2)).tolist() for k in range(11)}
    (ax,) = panels(heatmaps([cell(name, matrix) for name, matrix in rows.items()]))
    (mesh,) = ax.collections
    edges = mesh.get_coordinates()
    xs, ys = edges[0, :, 0], edges[:, 0, 1]
    for text in texts(ax, "score"):
        x, y = text.get_position()
        value = shown(ax)[np.searchsorted(ys, y) - 1, np.searchsorted(xs, x) - 1]
        assert text.get_text() == f"{value:.1f}"
    assert shown(ax).count() == len(texts(ax, "score")) == 11 * 6
    names = {t.get_text(): t.get_position() for t in texts(ax, "name")}
    assert len({y for _, y in names.values()}) > 1, "more than a row of panels"
    for name, (x, y) in names.items():
        beneath = [t for t in texts(ax, "score") if abs(t.get_position()[0] - x) < 1]
        (first, *_) = [t for t in beneath if t.get_position()[1] > y]
        assert first.get_text() == f"{100 * rows[name][0][0]:.1f}"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["math", "code"] * len(
        {x for x, _ in names.values()}
    )


def test_heatmaps_frame_what_was_just_learned_and_hatch_what_was_not_measured() -> None:
    rows: Rows = [[0.2, 0.3], [0.8, None], [0.7, 0.6]]
    (ax,) = panels(heatmaps([cell(matrix=rows)]))
    boxes = [p for p in ax.patches if isinstance(p, Rectangle)]
    framed = {p.get_xy() for p in boxes if not p.get_fill()}
    hatched = {p.get_xy() for p in boxes if p.get_hatch()}
    assert framed == {(0, 1), (1, 2)}  # x is the task, y the experience that learned it
    assert hatched == {(1, 1)}
    assert len(texts(ax, "score")) == 5  # no number where nothing was measured


def test_heatmaps_name_an_incomplete_cell() -> None:
    rows: Rows = [[0.2, 0.3], [0.8, 0.3], [None, None]]
    (ax,) = panels(heatmaps([cell(matrix=rows, complete=False, seed=4), cell(seed=0)]))
    whole, part = (t.get_text() for t in texts(ax, "name"))
    assert whole == "graftllm"
    assert "incomplete: seed 4" in part.replace("\n", " ")


def test_every_number_can_be_read_on_its_colour() -> None:
    """WCAG 2.1 asks for a contrast of 4.5 for small text."""
    ramp: Rows = [[0.04 * (5 * i + j) for j in range(5)] for i in range(6)]
    ramp = [[min(x or 0.0, 1.0) for x in row] for row in ramp]
    (ax,) = panels(heatmaps([cell(matrix=ramp, tasks=list("abcde"))]))
    mesh = ax.collections[0]
    for text in texts(ax, "score"):
        light, dark = sorted(
            (luminance(text.get_color()), luminance(mesh.to_rgba(float(text.get_text())))),
            reverse=True,
        )
        assert (light + 0.05) / (dark + 0.05) >= 4.5, text.get_text()


# --- curves -----------------------------------------------------------------------------------


def test_curves_have_a_panel_per_task_and_a_line_per_label() -> None:
    figure = curves([cell(), cell("sequential", FORGETS)])
    math, code = panels(figure)
    assert [math.get_title(), code.get_title()] == ["math", "code"]
    for j, ax in enumerate((math, code)):
        lines = {line.get_label(): line for line in ax.lines if line.get_marker() != "None"}
        assert set(lines) == {"graftllm", "sequential"}
        for label, rows in (("graftllm", KEEPS), ("sequential", FORGETS)):
            expected = [100 * (row[j] or 0.0) for row in rows]
            np.testing.assert_allclose(lines[label].get_ydata(), expected)
            np.testing.assert_allclose(lines[label].get_xdata(), [0, 1, 2], atol=0.15)
        (mark,) = (line for line in ax.lines if line.get_marker() == "None")
        assert list(mark.get_xdata()) == [j + 1, j + 1]  # where the task is learned
        assert [t.get_text() for t in ax.get_xticklabels()] == ["base", "math", "code"]
    legend = [t.get_text() for t in figure.legends[0].get_texts()]
    assert legend == ["graftllm", "sequential"]


def test_the_band_reaches_one_standard_error_to_either_side() -> None:
    ax = panels(curves([cell()]))[0]
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(20.0 - 2.0)
    assert heights.max() == pytest.approx(80.0 + 2.0)


def test_the_bands_of_many_lines_are_left_out_for_they_would_hide_one_another() -> None:
    for count, drawn in ((BANDS, BANDS), (BANDS + 1, 0)):
        figure = curves([cell(name) for name in KNOWN[:count]])
        assert len(panels(figure)[0].collections) == drawn
        assert ("Band" in figure.legends[0].get_title().get_text()) == bool(drawn)


def test_a_curve_has_a_gap_where_nothing_was_measured() -> None:
    rows: Rows = [[0.2, 0.3], [0.8, None], [0.7, 0.6]]
    code = panels(curves([cell(matrix=rows)]))[1]
    heights = np.asarray(code.lines[0].get_ydata(), float)
    assert np.isnan(heights).tolist() == [False, True, False]


def looks(figure: Figure) -> dict[str, tuple[str, Any, Any, Any]]:
    """{label: (colour, marker, fill, dash)} as drawn in the first panel."""
    return {
        str(line.get_label()): (
            to_hex(line.get_color()),
            line.get_marker(),
            line.get_fillstyle(),
            line.get_linestyle(),
        )
        for line in panels(figure)[0].lines
        if line.get_marker() != "None"
    }


def test_a_strategy_keeps_its_colour_and_marker_whatever_it_is_drawn_with() -> None:
    few = looks(curves([cell("model_tailor")]))
    many = looks(curves([cell(name) for name in (*KNOWN[::-1], "mine")]))
    assert few["model_tailor"] == many["model_tailor"]
    assert looks(curves([cell("mine")]))["mine"] == many["mine"]


def test_no_two_strategies_look_the_same() -> None:
    names = [*KNOWN, *(f"plugin_{k}" for k in range(30))]
    drawn = looks(curves([cell(name) for name in names]))
    assert len({look[:2] for look in drawn.values()}) == len(names)
    assert len({drawn[name][0] for name in KNOWN[:13]}) == 13


def test_labels_of_one_strategy_share_its_colour_and_differ_in_dash_and_fill() -> None:
    drawn = looks(curves([cell("lora"), cell("lora(rank=8)"), cell("lora(rank=64)")]))
    assert len({look[:2] for look in drawn.values()}) == 1
    assert len({look[2] for look in drawn.values()}) == 3
    assert len({look[3] for look in drawn.values()}) == 3


def test_an_incomplete_cell_is_dotted() -> None:
    rows: Rows = [[0.2, 0.3], [0.8, 0.3], [None, None]]
    drawn = looks(curves([cell(), cell("lora", rows, complete=False)]))
    dashes = {label.partition(" ")[0]: look[3] for label, look in drawn.items()}
    assert dashes == {"graftllm": "-", "lora": ":"}


# --- bytes against score ----------------------------------------------------------------------


def test_points_front_and_budget_of_bytes_against_score() -> None:
    cells = [
        cell("graftllm", pack=10.0),  # OP 72.5
        cell("sequential", FORGETS, pack=100.0),  # OP 45, beaten in both
        cell("lora", [[0.2, 0.3], [0.5, 0.3], [0.5, 0.6]], pack=2.0),  # OP 55
    ]
    (ax,) = panels(bytes_vs_score(cells))
    assert ax.get_xscale() == "log"
    points = {c.get_label(): c.lines[0].get_xydata()[0].tolist() for c in ax.containers}
    assert points == {
        "graftllm": pytest.approx([10.0, 72.5]),
        "sequential": pytest.approx([100.0, 45.0]),
        "lora": pytest.approx([2.0, 55.0]),
    }
    (front,) = (line for line in ax.lines if line.get_label() == "Pareto front")
    np.testing.assert_allclose(front.get_xydata(), [[2.0, 55.0], [10.0, 72.5], [100.0, 72.5]])
    (budget,) = (line for line in ax.lines if line.get_linestyle() == "--")
    assert list(budget.get_xdata()) == pytest.approx([10.0, 10.0])
    assert "budget 10%" in [t.get_text() for t in ax.texts]


def test_whiskers_are_one_standard_error_of_op() -> None:
    (ax,) = panels(bytes_vs_score([cell()]))
    (low, high) = ax.containers[0].lines[2][0].get_segments()[0][:, 1]
    assert (high - low) / 2 == pytest.approx(100 * np.hypot(0.02, 0.02) / 2)


def test_a_label_that_has_no_place_is_named_below() -> None:
    rows: Rows = [[0.2, 0.3], [0.8, 0.3], [None, None]]
    cells = [cell(), cell("joint", pack=None), cell("lora", rows, complete=False)]
    figure = bytes_vs_score(cells)
    (ax,) = panels(figure)
    assert [c.get_label() for c in ax.containers] == ["graftllm"]
    (note,) = (t.get_text() for t in shown_text(figure) if t.get_text().startswith("Not shown"))
    assert note.replace("\n", " ") == (
        "Not shown: joint (no pack), lora (incomplete: seed 0, 1 of 2 tasks)."
    )


def test_nothing_to_place_is_an_empty_figure_that_says_so() -> None:
    figure = bytes_vs_score([cell("joint", pack=None)])
    assert not panels(figure)[0].containers
    assert "Not shown: joint (no pack)." in [t.get_text() for t in shown_text(figure)]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12))
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int]]) -> None:
    def beaten(p: tuple[int, int]) -> bool:
        return any(q != p and q[0] <= p[0] and q[1] >= p[1] for q in points)

    assert pareto(points) == sorted({p for p in points if not beaten(p)})


def test_less_forgetting_is_better() -> None:
    cells = [
        cell("graftllm", pack=10.0),  # math loses 5
        cell("sequential", FORGETS, pack=100.0),  # loses 80
        cell("lora", [[0.2, 0.3], [0.5, 0.3], [0.3, 0.6]], pack=2.0),  # loses 20
    ]
    (ax,) = panels(bytes_vs_forgetting(cells))
    (front,) = (line for line in ax.lines if line.get_label() == "Pareto front")
    np.testing.assert_allclose(front.get_xydata(), [[2.0, 20.0], [10.0, 5.0], [100.0, 5.0]])


def test_one_task_has_no_forgetting_to_draw() -> None:
    figure = bytes_vs_forgetting([cell(matrix=[[0.2], [0.8]], tasks=["math"])])
    assert "Not shown: graftllm (unmeasured)." in [t.get_text() for t in shown_text(figure)]


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), max_size=12))
def test_a_front_where_less_is_better_is_that_of_the_negative(
    points: list[tuple[int, int]],
) -> None:
    assert pareto(points, -1) == [(x, -y) for x, y in pareto([(x, -y) for x, y in points])]


# --- costs ------------------------------------------------------------------------------------


def test_costs_are_bars_one_after_the_other() -> None:
    spent = {"train": 10.0, "compress": 2.0, "evaluate": 3.0, "harness": 1.0}
    time, memory = panels(
        costs([cell(seconds=spent, peak_memory_mb=700.0), cell("joint", seconds={})])
    )
    assert [t.get_text() for t in time.get_yticklabels()] == ["graftllm", "joint"]
    bars = {c.get_label(): c.patches[0] for c in time.containers}
    assert {k: (b.get_x(), b.get_width()) for k, b in bars.items()} == {
        "train": (0.0, 10.0),
        "compress": (10.0, 2.0),
        "evaluate": (12.0, 3.0),
        "harness": (15.0, 1.0),
    }
    assert memory.patches[0].get_width() == 700.0


# --- numbers that are alike -------------------------------------------------------------------

NOTHING: Rows = [[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("draw", [curves, bytes_vs_score, bytes_vs_forgetting])
def test_an_axis_of_zeros_spans_some_points(draw: Any) -> None:
    """Matplotlib's own is 0.1 % high, on which noise would be a mountain."""
    zeros = cell(matrix=NOTHING, stderr=None)
    low, high = panels(draw([zeros]))[0].get_ylim()
    assert high - low >= 5 and -1 < low < 0
    few = cell(matrix=[[0.9, 0.901]] * 3, stderr=None)
    low, high = panels(curves([few]))[0].get_ylim()
    assert low < 90 < high and high - low == pytest.approx(5)


def test_costs_of_nothing_have_an_axis() -> None:
    time, memory = panels(costs([cell(seconds={}, peak_memory_mb=None)]))
    assert time.get_xlim() == memory.get_xlim() == (0, 1)


@pytest.mark.parametrize("draw", [bytes_vs_score, bytes_vs_forgetting])
def test_points_that_hide_each_other_are_named(draw: Any) -> None:
    cells = [cell("lora"), cell("svd"), cell("ties", FORGETS, pack=3.0)]
    told = " ".join(t.get_text().replace("\n", " ") for t in shown_text(draw(cells)))
    assert "In one place: lora, svd." in told
    assert "In one place" not in " ".join(t.get_text() for t in shown_text(draw(cells[1:])))


def test_a_point_that_another_covers_for_the_most_part_is_named() -> None:
    """OP of 50, 50.4, 53 and 75 on an axis of 27.5 points: 1.5 and 9 hundredths apart, where a marker has 2.5."""
    rows: list[Rows] = [[[0.2, 0.3], [0.8, 0.35], [x, 0.7]] for x in (0.3, 0.308, 0.36, 0.8)]
    cells = [cell(f"plugin_{k}", matrix, stderr=None) for k, matrix in enumerate(rows)]
    told = " ".join(t.get_text().replace("\n", " ") for t in shown_text(bytes_vs_score(cells)))
    assert "In one place: plugin_0, plugin_1." in told  # but not plugin_2


def test_curves_that_are_equal_throughout_are_named() -> None:
    def title(cells: list[dict[str, Any]]) -> str:
        return curves(cells).legends[0].get_title().get_text().replace("\n", " ")

    assert title([cell("lora"), cell("svd"), cell("ties", FORGETS)]).endswith(
        "In one place: lora, svd."
    )
    assert "In one place" not in title([cell("lora"), cell("ties", FORGETS)])


def test_task_names_that_would_look_alike_stay_whole() -> None:
    long = ["sentiment_books_reviews", "sentiment_music_reviews", "commonsense_reasoning", "code"]
    assert shortened(long) == [*long[:2], "commonse…oning", "code"]


# --- layout -----------------------------------------------------------------------------------


def crowded(count: int = 8) -> list[dict[str, Any]]:
    """Long task names and labels, as in a paper's main figure."""
    tasks = ["c-stance", "fomc", "meetingbank", "scienceqa_images", "numglue_commonsense"]
    rng = np.random.default_rng(0)
    options = "(allocation=energy, group_size=64, calibration=256)"
    made = []
    for k, name in enumerate(KNOWN[:count]):
        rows: Rows = rng.uniform(0.2, 0.9, (6, 5)).tolist()
        label = name + (options if k % 2 else "")
        model = "meta-llama/Llama-3.1-8B-Instruct"
        made.append(cell(label, rows, tasks=tasks, pack=2.0 + k, model=model))
    return made


def over_budgets(cells: list[dict[str, Any]]) -> Figure:
    """The same at a tenth of the budget, a little worse, and full fine-tuning."""
    small = [
        c | {"budget": "1%", "alive_bytes": [x // 10 for x in c["alive_bytes"]]} for c in cells
    ]
    full = cells[0] | {"label": "individual", "strategy": "individual"}
    ((title, members),) = budgets.groups([*cells, *small, full]).items()
    return budgets.figure(title, members)


@pytest.mark.parametrize("draw", [*FIGURES.values(), over_budgets], ids=[*FIGURES, "budgets"])
@pytest.mark.parametrize("cells", [crowded(), crowded(3), [cell()]], ids=["8x5", "3x5", "1x2"])
def test_no_text_is_clipped_or_covered(draw: Any, cells: list[dict[str, Any]]) -> None:
    figure = draw(cells)
    figure.draw_without_rendering()
    page = figure.bbox.padded(1.0)
    boxes = [(t, t.get_window_extent()) for t in shown_text(figure)]
    boxes = [(t, box) for t, box in boxes if t.get_rotation() in (0.0, 90.0)]  # upright boxes
    for text, box in boxes:
        assert page.x0 <= box.x0 <= box.x1 <= page.x1, text.get_text()
        assert page.y0 <= box.y0 <= box.y1 <= page.y1, text.get_text()
    for k, (one, a) in enumerate(boxes):
        for other, b in boxes[k + 1 :]:
            assert not a.padded(-1.0).overlaps(b.padded(-1.0)), (one.get_text(), other.get_text())


def test_a_notebook_shows_a_figure_that_is_returned() -> None:
    """IPython asks an object for `_repr_png_`; of matplotlib's own figures it shows those of pyplot alone."""
    data = heatmaps([cell()])._repr_png_()  # type: ignore[attr-defined]
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "PNG" and min(image.size) > 200
        assert len(image.getcolors(1 << 20) or []) > 10


# --- files ------------------------------------------------------------------------------------


def test_written_figures_are_png_and_svg_and_the_same_every_time(tmp_path: Path) -> None:
    cells = [cell(), cell("sequential", FORGETS, pack=100.0)]

    def drawn(folder: str) -> list[Path]:
        stem = "math-code-mini-budget-10pct"
        return [
            f for name in FIGURES for f in draw(name, cells, tmp_path / folder / f"{stem}-{name}")
        ]

    first = drawn("one")
    assert [str(p.relative_to(tmp_path / "one")) for p in first] == [
        f"{folder}math-code-mini-budget-10pct-{kind}.{end}"
        for kind in FIGURES
        for folder, end in (("", "png"), ("", "svg"), ("dark/", "svg"))
    ]
    assert sorted(p for p in (tmp_path / "one").rglob("*.*")) == sorted(first)  # none is left
    for path, again in zip(first, drawn("two"), strict=True):
        assert path.read_bytes() == again.read_bytes(), path.name
    for path in first[::3]:
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.info["dpi"] == pytest.approx((150, 150), abs=0.1)
    for light, dark in zip(first[1::3], first[2::3], strict=True):
        assert light.read_text().rstrip().endswith("</svg>")
        assert dark.read_text() == darkened(light.read_text())
        assert "dc:date" not in light.read_text()
