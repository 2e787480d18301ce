"""What `cl-graft compare` says of two runs."""

from __future__ import annotations

import json
from pathlib import Path

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
    assert len(scores.rows) == 4
    for row in scores.rows:
        assert row[1] == row[2]
        assert row[3:] == ("+0.0", "+0.0", "+0.0", "1.000", "2")


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
    assert [row[-1] for row in scores["rows"]] == ["2", "2"]
    done = call("compare", str(one), str(next(two.iterdir())))
    assert "Cells of one run alone" in done.out


def test_a_folder_without_cells_is_refused(tmp_path: Path, call: Call) -> None:
    assert_refused(call("compare", str(tmp_path), str(tmp_path)), "holds no cell")


@pytest.mark.slow
def test_two_real_runs_of_two_strategies(tmp_path: Path, call: Call) -> None:
    """Their pages show prompts, which both keep in one file, since their data is the same."""
    small = {"mini": {"steps": 2, "test_size": 4, "train_size": 16, "tasks": "math,cipher"}}
    for strategy in ("sequential", "lora"):
        out = tmp_path / "results" if strategy == "lora" else tmp_path / "results"
        run(
            scenario="mini",
            strategy=strategy,
            model="nano-llama",
            options=small,
            out=out,
            wandb="off",
        )
    (data,) = (tmp_path / "results" / "data").iterdir()
    lines = [json.loads(line) for line in data.read_text().splitlines()]
    assert {line["task"] for line in lines} >= {"math", "cipher"}
    a, b = (next((tmp_path / "results").glob(f"*__{s}__*")) for s in ("sequential", "lora"))
    done = call("compare", str(a), str(b))
    assert done.code == 0
    assert "config.strategy" in done.out and "lora" in done.out
    assert call("report", str(tmp_path / "results")).code == 0
    page = (tmp_path / "results" / "report" / "cells" / f"{a.name}.html").read_text()
    from markupsafe import escape

    asked = [line["prompt"] for line in lines if line["task"] == "math"]
    assert all(str(escape(prompt)) in page for prompt in asked)
