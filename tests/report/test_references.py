"""What a report takes from other cells: intransigence by a reference, and which base its cells are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl_graft.report.aggregate import ability, base_note, groups, lines_of
from cl_graft.report.provenance import write_provenance
from cl_graft.report.references import with_references
from cl_graft.report.tables import matrices, metrics, ranking
from tests.report.test_tables import cell, half_done, rows_of

JOINT = [[0.2, 0.3], [0.95, 0.4], [0.9, 0.85]]  # of math once learned 0.95, of code 0.85
INDIVIDUAL = [[0.2, 0.3], [0.9, 0.3], [0.9, 0.8]]
LEARNED = [[0.2, 0.3], [0.8, 0.3], [0.6, 0.7]]  # 0.8 and 0.7


def intransigence(cells: list[dict[str, Any]], label: str) -> list[float | None]:
    found = [c for c in with_references(cells) if c["label"] == label]
    return [c["metrics"].get("intransigence", ...) for c in found]


def test_intransigence_is_to_joint_once_each_task_was_learned() -> None:
    """((0.95 - 0.8) + (0.85 - 0.7)) / 2, and not to joint's last row, which would be 0.125."""
    cells = [cell(matrix=LEARNED), cell("joint", JOINT), cell("individual", INDIVIDUAL)]
    assert intransigence(cells, "graftllm") == [pytest.approx(0.15)]
    assert intransigence(cells, "joint") == [0.0]
    assert intransigence(cells, "individual") == [pytest.approx(0.05)]
    (table,) = metrics(with_references(cells))
    assert rows_of(table)["graftllm"]["intransigence"] == "15.0"
    assert table.note.endswith("Intransigence: against joint of the same seed.")


def test_without_joint_it_is_to_individual_and_the_table_says_so() -> None:
    cells = [cell(matrix=LEARNED), cell("individual", INDIVIDUAL)]
    assert intransigence(cells, "graftllm") == [pytest.approx(0.1)]
    (table,) = metrics(with_references(cells))
    assert table.note.endswith("Intransigence: against individual of the same seed.")
    (table,) = metrics(with_references(cells[:1]))
    assert "intransigence" not in table.columns and "Intransigence" not in table.note


def test_a_reference_is_of_the_same_seed_and_experiment_at_any_budget() -> None:
    """Two references are never mixed: a seed that joint was not run with is unmeasured."""
    cells = [
        cell(matrix=LEARNED, seed=0),
        cell(matrix=LEARNED, seed=1),
        cell("joint", JOINT, seed=1, budget="5%"),
        cell("individual", INDIVIDUAL, seed=0),
    ]
    assert intransigence(cells, "graftllm") == [None, pytest.approx(0.15)]
    for other in ({"scenario": "else"}, {"model": "else"}, {"base": "ab" * 16}):
        assert intransigence([cell(matrix=LEARNED), cell("joint", JOINT, **other)], "graftllm") == [
            ...
        ]


def test_what_is_not_complete_is_no_reference_and_has_none() -> None:
    assert intransigence([cell(matrix=LEARNED), half_done("joint")], "graftllm") == [...]
    assert intransigence([half_done(), cell("joint", JOINT)], "graftllm") == [...]


# --- bases ---

HERE, THERE = "1a2b3c4d" * 4, "99887766" * 4


def of(base: str, model: str = "mini", **changes: Any) -> dict[str, Any]:
    config = {"model": model, "scenario": "math-code", "strategy": "graftllm", "options": {}}
    return cell(base=base, model=model, config=config, **changes)


def test_cells_of_different_weights_are_never_averaged() -> None:
    cells = [of(HERE, seed=0), of(HERE, seed=1), of(THERE, seed=2), of(THERE, "nano", seed=3)]
    found = groups(cells)
    assert list(found) == [
        "math-code · mini (1a2b3c4d) · budget 10%",
        "math-code · mini (99887766) · budget 10%",
        "math-code · nano · budget 10%",
    ]
    assert [len(lines_of(members)[0].cells) for members in found.values()] == [2, 1, 1]
    notes = [base_note(members) for members in found.values()]
    assert notes[0].startswith("Base: weights 1a2b3c4d. Other weights are called mini, too")
    assert notes[2] == "Base: weights 99887766."
    assert [t.note.startswith(n) for t, n in zip(ranking(cells), notes, strict=True)] == [True] * 3


def test_one_base_needs_no_name_of_its_own() -> None:
    assert list(groups([of(HERE), of(HERE, seed=1)])) == ["math-code · mini · budget 10%"]


def test_provenance_has_the_bases_in_full(tmp_path: Path) -> None:
    more = {"versions": {}, "machine": {}, "reads_data_dir": False}
    cells = [of(HERE, **more), of(HERE, seed=1, **more), of(THERE, seed=2, **more)]
    text = write_provenance(cells, tmp_path).read_text()
    assert f"- mini: {HERE} (2 cells)\n- mini: {THERE} (1 cell)\n" in text


# --- general ability ---


def test_general_ability_says_what_it_is_of() -> None:
    """Told the task: the mean over packs, 0.5 -> (0.2 + 0.3) / 2, and each of them beside the matrix."""
    config = {"model": "mini", "scenario": "math-code", "strategy": "graftllm", "options": {}}
    told = {"config": config | {"task_ids": "given"}, "general": [0.5, 0.2, 0.25]}
    packs = {"general_packs": [[None, None], [0.2, None], [0.2, 0.3]]}
    routed = {"config": config | {"task_ids": "inferred"}, "general": [0.5, 0.2, 0.4], **packs}
    assert [ability(c) for c in (cell(), cell(**told, **packs), cell(**routed))] == [
        "one model",
        "each pack, mean",
        "router's choice",
    ]
    assert ability(cell(general=[None, None, None])) == ability(cell(general=[0.5])) == "–"
    (row,) = ranking([cell(**told, **packs)])[0].rows
    columns = ranking([cell(**told, **packs)])[0].columns
    assert row[columns.index("General Δ")] == "-25.0"
    assert row[columns.index("General of")] == "each pack, mean"
    by_pack = matrices([cell(**told, **packs)])[1]
    assert by_pack.title.endswith("graftllm, general ability by pack")
    assert by_pack.rows == (
        ("none (base)", "50.0", "–"),
        ("math", "20.0", "-30.0"),
        ("code", "30.0", "-20.0"),
    )
    assert len(matrices([cell()])) == 1
