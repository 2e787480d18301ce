"""Several budgets of one strategy side by side: what is kept of full fine-tuning's gain."""

from __future__ import annotations

from typing import Any

import pytest

from cl_graft.report import budgets
from tests.report.test_tables import cell


def at(label: str, budget: str, seed: int, score: float, base: float = 0.2) -> dict[str, Any]:
    size = {"5%": 100_000, "10%": 200_000}[budget]
    return cell(
        label,
        [[base, base], [score, base], [score, score]],
        budget=budget,
        seed=seed,
        budget_bytes=size,
        pack_bytes=[size, size],
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
    assert made.columns == ("Strategy", "OP at 5%", "kept at 5%", "OP at 10%", "kept at 10%")
    full, lora = made.rows
    assert full == ("individual", "85.0 ± 5.0", "100 ± 0.0", "85.0 ± 5.0", "100 ± 0.0")
    assert lora[:3] == ("lora", "52.5 ± 2.5", "50 ± 0.0")
    assert lora[4] == "72 ± 2.5"  # .45 / .6 and .49 / .7


def test_one_budget_and_unfinished_cells_make_no_group():
    assert budgets.groups(CELLS[:2]) == {}
    assert budgets.groups([{**c, "complete": False} for c in CELLS]) == {}


def test_the_figure_has_a_line_a_strategy_and_the_two_levels(tmp_path):
    ((title, members),) = budgets.groups(CELLS).items()
    (ax,) = budgets.figure(title, members).axes
    (line,) = ax.containers
    assert list(line.lines[0].get_xdata()) == [5.0, 10.0]
    assert list(line.lines[0].get_ydata()) == pytest.approx([52.5, 67.0])
    assert sorted(t.get_text() for t in ax.texts) == ["base", "full fine-tuning"]
    names = {p.suffix for p in budgets.write(CELLS, tmp_path / "mini-budgets")}
    assert names == {".md", ".csv", ".tex", ".png", ".svg"}
