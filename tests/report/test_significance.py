"""Who stands where: cells as a sweep leaves them, with outcomes written by hand, against the differences they make."""

from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cl_graft.report import ReportedCell
from cl_graft.report import significance as module
from cl_graft.report.page import rows
from cl_graft.report.significance import NOTE, Sample, difference, ranked_lines, reader, table
from cl_graft.report.statistics import Strata
from tests.report.test_tables import cell as made

N = 40
FLIPS = (0, 3, 7, 11, 15, 20, 26, 33)  # examples that differ without changing the mean, in pairs


def outcomes(right: int, shift: int = 0) -> np.ndarray:
    """So many of the N examples right, from `shift` on."""
    return np.roll((np.arange(N) < right).astype(float), shift)


def found(label: str, seed: int, right: int, complete: bool = True) -> ReportedCell:
    """A cell of one task."""
    op = right / N
    rows = [[0.1], [op if complete else None]]
    about = {"tasks": ["math"], "seed": seed, "complete": complete, "n": [[N], [N]]}
    return ReportedCell(
        Path(f"{label}-{seed}"), made(label, rows, stderr=[[0.01], [0.02]], **about)
    )


def answers(**scores: Any) -> Any:
    """A reader of {label: {seed: number right}}, all seeds on examples of their own."""

    def read(cell: ReportedCell) -> tuple[str, Strata]:
        seed = cell.cell["seed"]
        right = scores[cell.cell["label"]][seed]
        return str(seed), [(1.0, outcomes(right))]

    return read


def group(**scores: dict[int, int]) -> list[ReportedCell]:
    return [found(label, seed, n) for label, those in scores.items() for seed, n in those.items()]


def ranked(**scores: dict[int, int]) -> dict[str, module.RankedLine]:
    return {s.line.name: s for s in ranked_lines(group(**scores), answers(**scores))}


# --- the order, and the intervals -------------------------------------------------------------


def test_the_best_mean_comes_first_and_each_is_compared_to_it():
    """Means of 30 and 20 of 40: 25 points behind, by Student's t over two seeds each."""
    known = ranked(low={0: 18, 1: 22}, high={0: 29, 1: 31})
    assert list(known) == ["high", "low"]
    high, low = known.values()
    assert high.behind is None and not high.significant
    assert high.op.mean == 0.75
    assert high.op.high - 0.75 == pytest.approx(12.7062 * 0.025, abs=1e-4)  # s.e. of .725 and .775
    assert low.behind.mean == pytest.approx(-0.25)
    assert (low.behind.seeds, low.behind.examples, low.seeds) == (2, 2 * N, 2)


def test_one_seed_has_limits_over_its_examples_and_never_a_star():
    known = ranked(a={0: 40}, b={0: 10})
    assert known["a"].op.high == pytest.approx(1.0)
    assert known["a"].op.low == pytest.approx(N / (N + 1.96**2), abs=1e-3)  # Wilson, all right
    assert known["b"].behind.p < 0.001
    assert not known["b"].significant
    assert table("", list(known.values())).rows[1][11] == ""


def test_without_examples_the_interval_is_the_normal_and_nothing_is_compared():
    known = ranked_lines(group(a={0: 30}, b={0: 10}), lambda cell: ("", []))
    assert known[0].op.high - known[0].op.mean == pytest.approx(1.96 * 0.02, abs=1e-4)
    assert known[1].behind is None


def test_incomplete_cells_come_last_and_are_compared_to_nothing():
    """As in a report of a sweep under way: a label may be there twice, whole and in part."""
    cells = [found("a", 0, 40, complete=False), found("b", 0, 10), found("a", 1, 30)]
    known = ranked_lines(cells, answers(a={1: 30}, b={0: 10}))
    assert [s.line.name for s in known] == ["a", "b", "a (incomplete: seed 0, 0 of 1 tasks)"]
    assert known[1].behind is None  # no seed in common
    assert (known[2].op, known[2].behind) == (None, None)
    assert [row[3] for row in table("", known).rows] == ["75.0", "25.0", "–"]


def test_a_group_without_a_complete_cell_has_lines_and_no_best():
    (only,) = ranked_lines([found("a", 0, 40, complete=False)], answers(a={0: 40}))
    assert (only.op, only.behind) == (None, None)
    assert not ranked_lines([found("a", 0, 4, complete=False)], answers(a={0: 4}))[0].significant


# --- differences ------------------------------------------------------------------------------


def sample(right: dict[int, int], test: str = "") -> Sample:
    return {seed: (test or str(seed), [(1.0, outcomes(n))]) for seed, n in right.items()}


def test_only_seeds_that_both_have_are_paired():
    both = difference(sample({0: 30, 1: 30, 2: 4}), sample({0: 20, 1: 20, 5: 40}))
    assert both is not None
    assert (both.mean, both.seeds, both.examples) == (0.25, 2, 2 * N)
    assert difference(sample({0: 30}), sample({1: 30})) is None


def test_only_the_same_examples_are_paired():
    assert difference(sample({0: 30}, "a"), sample({0: 20}, "b")) is None
    assert difference(sample({0: 30}), {0: ("0", [])}) is None
    shorter: Sample = {0: ("0", [(1.0, outcomes(20)[:10])])}
    assert difference(sample({0: 30}), shorter) is None


def test_what_seeds_share_is_told_to_the_bootstrap(monkeypatch: pytest.MonkeyPatch):
    told = []
    monkeypatch.setattr(module, "paired", lambda pairs, tests: told.append(tests))
    right = {0: 30, 1: 31, 2: 32}
    difference(sample(right, "one"), sample(right, "one"))
    difference(sample(right), sample(right))
    assert [len(set(tests)) for tests in told] == [1, 3]


def test_the_same_examples_for_all_seeds_are_less_evidence():
    """Eight of 40 examples differ, the same in each seed: shared, they are eight, and not three times eight."""
    flips = outcomes(0)
    flips[list(FLIPS)] = 1.0
    one: Sample = {s: (str(s), [(1.0, flips)]) for s in range(3)}
    other: Sample = {s: (str(s), [(1.0, outcomes(0))]) for s in range(3)}
    apart = difference(one, other)
    shared = difference(*({s: ("all", x) for s, (_, x) in those.items()} for those in (one, other)))
    assert apart and shared
    assert (shared.high - shared.low) / (apart.high - apart.low) == pytest.approx(math.sqrt(3), 0.1)


# --- behind the best --------------------------------------------------------------------------


def test_p_is_corrected_within_the_group():
    """Three are compared, so that the smallest p is three times its own."""
    scores = {"best": {0: 33, 1: 35}, "x": {0: 28, 1: 30}, "y": {0: 27, 1: 31}, "z": {0: 32, 1: 33}}
    known = ranked(**scores)
    alone = {
        name: difference(sample(scores[name]), sample(scores["best"])).p for name in ("x", "y", "z")
    }
    smallest = min(alone, key=alone.get)
    assert known[smallest].behind.p == pytest.approx(min(1.0, 3 * alone[smallest]))
    assert all(known[name].behind.p >= p for name, p in alone.items())


def test_far_behind_by_several_seeds_is_marked():
    known = ranked(a=dict.fromkeys(range(3), 38), b=dict.fromkeys(range(3), 6))
    assert known["b"].significant
    assert table("", list(known.values())).rows[1][11] == "*"


def test_who_is_better_where_both_were_paired_is_not_behind():
    """By mean a is best (40 six times, 6 three times), but on the three seeds that b has it is far below b."""
    scores = {"a": dict.fromkeys(range(6), 40) | dict.fromkeys((6, 7, 8), 6)}
    scores["b"] = dict.fromkeys((6, 7, 8), 22)
    known = ranked(**scores)
    assert list(known) == ["a", "b"]
    b = known["b"]
    assert b.behind.mean == pytest.approx(16 / N)
    assert b.behind.p < 0.05 and b.behind.low > 0  # sure, in the other direction
    assert not b.significant
    assert (b.behind.seeds, b.seeds) == (3, 9)
    shown = rows.ranking(list(known.values()))[1]
    assert (shown["mark"], shown["p"].small) == ("", "3 of 9 seeds")


# --- as files and on the page -----------------------------------------------------------------


def test_the_csv_has_p_as_a_number_and_scores_in_full():
    known = ranked(a=dict.fromkeys(range(5), 38), b=dict.fromkeys(range(5), 7))
    made = table("mini", list(known.values()))
    assert made.rows[1][10] == "< 0.001"
    a, b = csv.DictReader(io.StringIO(made.csv()))
    assert (a["p (Holm)"], a["Δ"]) == ("", "")
    assert 0 < float(b["p (Holm)"]) < 0.001
    assert (b["OP"], b["Δ"]) == ("17.5000", "-77.5000")
    assert "no proof" in NOTE and "nothing of other seeds" in NOTE


def test_an_interval_is_drawn_from_0_to_1():
    """Two seeds far apart have a t interval of hundreds of points; drawn so, the others would be a dot."""
    known = ranked(a={0: 38, 1: 20}, b={0: 20, 1: 21})
    wide, narrow = (row["plot"] for row in rows.ranking(list(known.values())))
    assert known["a"].op.high > 1.5
    assert all(0 <= x <= rows.WIDTH for x in (*wide, *narrow))
    assert wide[2] == rows.WIDTH - 5 and wide[0] == 5
    assert narrow[2] - narrow[0] > 20  # b's is 32 points wide


# --- what was tested --------------------------------------------------------------------------


def test_a_test_set_is_known_by_its_examples_not_by_the_data(tmp_path: Path):
    """Seeds train on other data; the digest is of what they were asked, in the tasks of the cell alone."""
    (tmp_path / "data").mkdir()

    def keep(data: str, *lines: tuple[str, str]) -> str:
        told = [
            {"task": task, "index": 0, "prompt": prompt, "reference": ""} for task, prompt in lines
        ]
        (tmp_path / "data" / f"{data}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in told)
        )
        cell = {"data": data, "tasks": ["math"], "matrix": [[0.1], [0.2]]}
        return reader()(ReportedCell(tmp_path / "cell", cell))[0]

    first = keep("d0", ("math", "1 + 1"))
    assert keep("d1", ("math", "1 + 1")) == first
    assert keep("d2", ("math", "1 + 1"), ("general:facts", "who?")) == first
    assert keep("d3", ("math", "1 + 2")) != first
    assert keep("d4", ("code", "1 + 1")) == "d4"  # of math nothing was kept
