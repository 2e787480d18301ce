"""What `cl-graft compare` says of two runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cl_graft import run
from cl_graft.bench.report import make
from cl_graft.report.compare import compare, flattened
from tests.command import Call, assert_refused


def test_a_mapping_is_flattened_to_dotted_names() -> None:
    assert flattened({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}


def test_a_run_and_itself_differ_in_nothing(tmp_path: Path) -> None:
    make(tmp_path, cells=8, examples=6, strategies=2)
    about, scores = compare(tmp_path, tmp_path)
    assert about.rows == () and "are the same" in about.note
    rows = [row for row in scores.rows if row[1] == "OP"]
    assert len(rows) == 4
    for row in rows:
        assert row[2] == row[3]
        assert row[4:] == ("seeds, examples", "+0.0 [+0.0, +0.0]", "1.000", "2")
    assert all(row[6] == "1.000" for row in scores.rows if row[1] in ("math", "code", "cipher"))


def one_cell(out: Path, right: int, examples: int = 20, **result: Any) -> None:
    """A run of one seed that got `right` of the examples of each of its three tasks right at the end."""
    make(out, cells=1, examples=examples, strategies=1, scenarios=1)
    (cell,) = (p.parent for p in out.glob("*/result.json"))
    file = cell / "experiences" / "03" / "examples.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["score"] = float(line["index"] < right)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    told = json.loads((cell / "result.json").read_text())
    told["matrix"][-1] = [right / examples] * 3
    told["metrics"]["op"] = right / examples
    (cell / "result.json").write_text(json.dumps(told | result))


def test_the_difference_is_b_less_a(tmp_path: Path) -> None:
    """15 of 20 less 5 of 20 is 50 points; the ten examples of each task that differ make it sure."""
    one_cell(tmp_path / "a", 5)
    one_cell(tmp_path / "b", 15)
    _, scores = compare(tmp_path / "a", tmp_path / "b")
    rows = {row[1]: row[2:] for row in scores.rows}
    a, b, over, less, p, seeds = rows["OP"]
    assert over == "examples"
    assert a.startswith("25.0 [1") and b.startswith("75.0 [6")  # with Wilson's limits
    assert less.startswith("+50.0 [+3") and (p, seeds) == ("< 0.001", "1")
    assert set(rows) == {"OP", "BWT", "FM", "math", "code", "cipher", "Bytes alive"}
    assert rows["Bytes alive"] == (
        "120,000",
        "120,000",
        "",
        "+0",
        "",
        "1",
    )  # three packs of 2 % of 2 MB
    a, b, _, less, p, _ = rows["code"]  # a third of the examples: wider
    assert a.startswith("25.0 [1") and b.startswith("75.0 [5")
    assert less.startswith("+50.0 [+30.0, +70.0]")
    assert (
        p == "0.006"
    )  # three times that of a sign test of ten, for the three tasks that are alike
    assert rows["BWT"][4:] == rows["FM"][4:] == ("", "1")


def inferred(out: Path, right: int, alive: int) -> None:
    """A run in which a router took `right` of 15 test examples for the task they are of, and `alive` bytes are kept."""
    one_cell(out, 5, alive_bytes=[0, 0, alive], routing_accuracy=[None, 1.0, 0.5, right / 15])
    for file in [*out.glob("*/cell.json"), *out.glob("*/result.json")]:
        told = json.loads(file.read_text())
        told["config"]["task_ids"] = "inferred"
        file.write_text(json.dumps(told))


def test_routing_and_bytes_are_compared_where_both_have_them(tmp_path: Path) -> None:
    inferred(tmp_path / "a", 9, 100_000)
    inferred(tmp_path / "b", 12, 103_500)
    one_cell(tmp_path / "given", 5)
    about, scores = compare(tmp_path / "a", tmp_path / "b")
    rows = {row[1]: row[2:] for row in scores.rows}
    assert rows["Routing"] == ("60.0", "80.0", "", "+20.0", "", "1")
    assert rows["Bytes alive"] == ("100,000", "103,500", "", "+3,500", "", "1")
    assert about.rows == ()
    about, scores = compare(tmp_path / "given", tmp_path / "b")
    assert "Routing" not in {row[1] for row in scores.rows}
    assert {row[6] for row in scores.rows} == {
        "–",
        "",
    }  # the easier problem is tested against no other
    assert "one is told the task at test and the other is not" in scores.note
    assert ("task IDs at test", "given", "inferred (ridge)", "1") in about.rows


def test_runs_that_differ_in_training_alone_are_paired(tmp_path: Path) -> None:
    """Another fingerprint of the data, the same test examples: as mini has them for all seeds."""
    one_cell(tmp_path / "a", 5)
    one_cell(tmp_path / "b", 15, data="e" * 32)
    (kept,) = (tmp_path / "b" / "data").glob("*.jsonl")
    kept.rename(kept.with_name(f"{'e' * 32}.jsonl"))
    about, scores = compare(tmp_path / "a", tmp_path / "b")
    assert [row[0] for row in about.rows] == ["data"]
    assert scores.rows[0][5].startswith("+50.0 [")


def test_a_task_with_other_test_examples_is_not_paired_though_the_others_are(
    tmp_path: Path,
) -> None:
    one_cell(tmp_path / "a", 5)
    one_cell(tmp_path / "b", 15)
    (kept,) = (tmp_path / "b" / "data").glob("*.jsonl")
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    for line in lines:
        if line["task"] == "math":
            line["prompt"] += "?"
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = {row[1]: row[5:] for row in compare(tmp_path / "a", tmp_path / "b")[-1].rows}
    assert rows["OP"] == rows["math"] == ("+50.0", "–", "1")
    assert rows["code"][0].startswith("+50.0 [+30.0, +70.0]")


def test_why_nothing_was_paired_is_told(tmp_path: Path) -> None:
    one_cell(tmp_path / "a", 5)
    one_cell(tmp_path / "b", 15)
    (kept,) = (tmp_path / "b" / "data").glob("*.jsonl")
    kept.write_text(kept.read_text().replace("Anna", "Berta"))
    scores = compare(tmp_path / "a", tmp_path / "b")[-1]
    assert scores.rows[0][5:] == ("+50.0", "–", "1")
    assert scores.note.endswith("(its test examples differ).")
    for file in tmp_path.glob("b/*/experiences/03/examples.jsonl"):
        file.unlink()
    assert "are not on disk" in compare(tmp_path / "a", tmp_path / "b")[-1].note


def test_seeds_that_differ_are_not_called_other_test_examples(tmp_path: Path) -> None:
    one_cell(tmp_path / "a", 5)
    one_cell(tmp_path / "b", 15, seed=7)
    scores = compare(tmp_path / "a", tmp_path / "b")[-1]
    assert scores.note.endswith("(their seeds differ).")


def test_base_weights_and_code_that_differ_are_told(tmp_path: Path) -> None:
    one_cell(tmp_path / "a", 5, base="0" * 32, code="a" * 32)
    one_cell(tmp_path / "b", 5, base="1" * 32, code="b" * 32)
    assert {row[0] for row in compare(tmp_path / "a", tmp_path / "b")[0].rows} == {"base", "code"}


def test_runs_without_a_common_cell_are_not_called_the_same(tmp_path: Path) -> None:
    make(tmp_path / "a", cells=2, examples=4, strategies=2, scenarios=1)
    make(tmp_path / "b", cells=2, examples=4, strategies=2, scenarios=1)
    for file in tmp_path.glob("b/*/result.json"):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"budget": "5%"}))
    alone, about = compare(tmp_path / "a", tmp_path / "b")
    assert len(alone.rows) == 4
    assert about.rows == () and about.note.startswith("No cell of A has its like in B")


def test_versions_options_data_and_cells_that_differ_are_told(tmp_path: Path, call: Call) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    make(one, cells=4, examples=6, strategies=2, scenarios=1)
    make(two, cells=4, examples=6, strategies=2, scenarios=1)
    for name in ("cell.json", "result.json"):
        for file in two.glob(f"*__seed0/{name}"):
            told = json.loads(file.read_text())
            told["versions"]["torch"] = "9.9"
            told["options"]["rank"] = 64
            told["data"] = "f" * 32
            file.write_text(json.dumps(told))
    done = call("compare", str(one), str(two), "--json")
    assert (done.code, done.err) == (0, "")
    about, scores = json.loads(done.out)
    rows = {row[0]: row[1:] for row in about["rows"]}
    assert set(rows) == {"versions.torch", "options.rank", "data"}
    assert rows["options.rank"] == ["8", "64", "2"]
    assert [row[-1] for row in scores["rows"] if row[1] == "OP"] == ["1 of 2", "1 of 2"]
    done = call("compare", str(one), str(next(two.iterdir())))
    assert "Cells of one run alone" in done.out


def test_a_folder_without_cells_is_refused(tmp_path: Path, call: Call) -> None:
    assert_refused(call("compare", str(tmp_path), str(tmp_path)), "holds no cell")


@pytest.mark.slow
def test_two_real_runs_of_two_strategies(tmp_path: Path, call: Call) -> None:
    """Their pages show prompts, which both keep in one file, since their data is the same."""
    small = {"mini": {"steps": 2, "test_size": 4, "train_size": 16, "tasks": "math,cipher"}}
    for strategy in ("sequential", "lora"):
        run(
            scenario="mini",
            strategy=strategy,
            model="nano-llama",
            options=small,
            out=tmp_path / "results",
            wandb="off",
        )
    (data,) = (tmp_path / "results" / "data").glob("*.jsonl")
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    assert {line["task"] for line in lines} >= {"math", "cipher"}
    a, b = (next((tmp_path / "results").glob(f"*__{s}__*")) for s in ("sequential", "lora"))
    done = call("compare", str(a), str(b))
    assert done.code == 0
    assert "config.strategy" in done.out and "lora" in done.out
    assert call("report", str(tmp_path / "results")).code == 0
    page = (tmp_path / "results" / "report" / "cells" / "sequential.html").read_text()
    from markupsafe import escape

    asked = [line["prompt"] for line in lines if line["task"] == "math"]
    assert all(str(escape(prompt)) in page for prompt in asked)
