"""Several budgets of one strategy side by side: what is kept of full fine-tuning's gain."""

from __future__ import annotations

from typing import Any

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from cl_graft.report import budgets
from cl_graft.report.style import KNOWN, PALETTE
from tests.report.test_figures import shown_text
from tests.report.test_tables import cell


def at(label: str, budget: str, seed: int, score: float, base: float = 0.2) -> dict[str, Any]:
    size = {"5%": 100_000, "10%": 200_000}[budget]
    return cell(
        label,
        [[base, base], [score, base], [score, score]],
        budget=budget,
        seed=seed,
        budget_bytes=size,
        alive_bytes=[size, 2 * size],
    )


CELLS = [
    at("individual", budget, seed, 0.8 + 0.1 * seed) for budget in ("5%", "10%") for seed in (0, 1)
] + [
    at("lora", "5%", 0, 0.5),
    at("lora", "5%", 1, 0.55),
    at("lora", "10%", 0, 0.65),
    at("lora", "10%", 1, 0.69),
]


def test_kept_is_the_share_of_the_gain_of_the_same_seeds_full_fine_tuning():
    """Seed 0 gains .6 in full and .3 by LoRA at 5 %; seed 1 .7 and .35: half, exactly."""
    ((title, members),) = budgets.groups(CELLS).items()
    made = budgets.table(title, members)
    assert made.columns == (
        "Strategy",
        "Task IDs",
        "Budget",
        "OP at 5%",
        "kept at 5%",
        "OP at 10%",
        "kept at 10%",
    )
    full, lora = made.rows
    assert full == (
        "individual",
        "not needed",
        "each",
        "85.0 ± 5.0",
        "100.0 ± 0.0",
        "85.0 ± 5.0",
        "100.0 ± 0.0",
    )
    assert lora[:5] == ("lora", "not needed", "each", "52.5 ± 2.5", "50.0 ± 0.0")
    assert lora[6] == "72.5 ± 2.5"  # .45 / .6 and .49 / .7


def test_one_budget_and_unfinished_cells_make_no_group():
    assert budgets.groups(CELLS[:2]) == {}
    assert budgets.groups([{**c, "complete": False} for c in CELLS]) == {}


def test_what_was_not_measured_leaves_a_gap():
    gap = at("ewc", "5%", 0, 0.5)
    gap["metrics"]["op"] = None
    ((title, members),) = budgets.groups([*CELLS, gap]).items()
    assert budgets.table(title, members).rows[-1] == (
        "ewc",
        "not needed",
        "each",
        "–",
        "–",
        "–",
        "–",
    )
    assert "ewc" not in legend(budgets.figure(title, members))


def legend(figure: Figure) -> list[str]:
    (ax,) = figure.axes
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_the_figure_has_a_line_a_strategy_and_the_two_levels(tmp_path):
    ((title, members),) = budgets.groups(CELLS).items()
    drawn = budgets.figure(title, members)
    (ax,) = drawn.axes
    (line,) = ax.containers
    assert list(line.lines[0].get_xdata()) == [5.0, 10.0]
    assert list(line.lines[0].get_ydata()) == pytest.approx([52.5, 67.0])
    assert to_hex(line.lines[0].get_color()) == PALETTE[KNOWN.index("lora")].lower()
    assert sorted(legend(drawn)) == ["base model", "full fine-tuning", "lora"]
    files = budgets.write(CELLS, tmp_path / "mini-budgets")
    assert {p.suffix for p in files} == {".md", ".csv", ".tex", ".png", ".svg"}


def test_its_ticks_are_plain_numbers():
    """STYLE takes a dollar sign for a dollar sign, and matplotlib's own labels of a log axis are full of them."""
    ((title, members),) = budgets.groups(CELLS).items()
    drawn = budgets.figure(title, members)
    drawn.draw_without_rendering()
    ticks = [t.get_text() for t in shown_text(drawn) if t in drawn.axes[0].get_xticklabels()]
    assert {"5", "10"} <= {f"{float(tick):g}" for tick in ticks}
