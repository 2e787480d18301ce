"""A results folder in which one file is torn: it costs one cell of a report, named in a line, and nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cl_graft.bench.report import make
from cl_graft.report import find
from cl_graft.store.record import CellFolder
from tests.command import Call, assert_refused

CELLS = 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four finished cells of one scenario."""
    out = tmp_path_factory.mktemp("results")
    make(out, CELLS, examples=3, strategies=CELLS, scenarios=1)
    for file in list(out.glob("*/cell.json")):
        CellFolder(file.parent).mark("done")
    return out


@pytest.fixture
def out(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.fixture
def result(out: Path) -> Path:
    return sorted(out.glob("*/result.json"))[1]


def with_part(change: Callable[[dict[str, Any]], Any]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        value = json.loads(text)
        change(value)
        return json.dumps(value)

    return changed


TORN: dict[str, Callable[[str], str]] = {
    "truncated": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "not JSON": lambda text: "<html>502</html>",
    "a list": lambda text: "[]",
    "null": lambda text: "null",
    "a matrix in words": with_part(lambda v: v.update(matrix="ninety")),
    "a score in words": with_part(lambda v: v["matrix"][1].__setitem__(0, "ninety")),
    "no matrix": with_part(lambda v: v.pop("matrix")),
    "no metrics": with_part(lambda v: v.pop("metrics")),
    "no label": with_part(lambda v: v.pop("label")),
    "a row too few": with_part(lambda v: v["matrix"].pop()),
    "a row too short": with_part(lambda v: v["stderr"][2].pop()),
    "a config in words": with_part(lambda v: v.update(config="none")),
}


@pytest.mark.parametrize("damage", TORN)
def test_a_torn_result_costs_one_cell(damage: str, out: Path, result: Path, call: Call) -> None:
    result.write_text(TORN[damage](result.read_text()))
    done = call("report", out, "--json")
    assert done.code == 0 and len(json.loads(done.out)) == CELLS - 1
    assert done.err.startswith(f"left out: {result}") and done.err.count("\n") == 1
    assert done.err.endswith("; run the same command again to make it anew.\n")

    told = call("status", out)
    (line,) = [line for line in told.out.splitlines() if line.startswith("unreadable")]
    assert told.code == 0 and result.parent.name in line and str(result) in line
    assert told.out.endswith(f"{CELLS - 1} done, 0 running, 0 waiting, 0 failed, 1 unreadable\n")


def test_the_report_and_the_comparison_of_the_others_are_made(
    out: Path, whole: Path, result: Path, call: Call
) -> None:
    result.write_text("{")
    done = call("report", out)
    assert done.code == 0 and (out / "report" / "index.html").is_file()
    assert [line for line in done.err.splitlines() if "left out" in line] == [
        done.err.removesuffix("\n")
    ]
    left_out = json.loads((whole / result.relative_to(out)).read_text())["label"]
    (ranking,) = (out / "report").glob("*-ranking.csv")
    labels = {line.partition(",")[0] for line in ranking.read_text().splitlines()[1:]}
    assert len(labels) == CELLS - 1 and left_out not in labels

    compared = call("compare", whole, out, "--json")
    assert compared.code == 0 and compared.err.startswith(f"left out: {result}")
    alone, differing, _ = json.loads(compared.out)
    assert [left_out in row[0] for row in alone["rows"]] == [True]
    assert differing["title"] == "What differs between 3 cells and theirs"


@pytest.mark.parametrize("file", ["cell.json", "experiences/00/experience.json"])
@pytest.mark.parametrize("damage", ["truncated", "a list", "no part"])
def test_of_a_cell_under_way_every_file_may_be_torn(
    file: str, damage: str, out: Path, result: Path, call: Call
) -> None:
    cell, torn = result.parent, result.parent / file
    result.unlink()
    text = "{}" if damage == "no part" else TORN[damage](torn.read_text())
    torn.write_text(text)
    done = call("report", out, "--json")
    assert done.code == 0 and len(json.loads(done.out)) == CELLS - 1
    assert done.err.startswith("left out: ") and str(cell) in done.err
    assert done.err.count("\n") == 1
    assert call("status", out).code == 0


def test_a_torn_state_is_no_end_of_status(out: Path, result: Path, call: Call) -> None:
    for text in ("", "[]", "{}", '{"state": "asleep"}'):
        (result.parent / "state.json").write_text(text)
        told = call("status", out)
        assert told.code == 0 and "1 unreadable" in told.out
        assert not text or "delete the file, and run the same command again." in told.out
    (result.parent / "state.json").unlink()
    assert CellFolder(result.parent).state()["state"] == "done"


def test_answers_that_are_torn_are_not_shown_and_nothing_else_is_lost(
    out: Path, result: Path, call: Call
) -> None:
    for file in result.parent.glob("experiences/*/examples.jsonl"):
        file.write_text(file.read_text()[:-40])
    (kept,) = (out / "data").glob("*.jsonl")
    kept.write_text("{\n{")
    done = call("report", out)
    assert (done.code, done.err) == (0, "")
    assert len(list((out / "report" / "cells").iterdir())) == CELLS


def test_where_no_cell_can_be_read_it_is_an_error(out: Path, call: Call) -> None:
    for file in out.glob("*/result.json"):
        file.write_text("")
    assert_refused(call("report", out), "result.json cannot be read")
    with pytest.warns(UserWarning, match="left out"):
        (out / "none").mkdir()
        shutil.copytree(next(out.glob("*/cell.json")).parent, out / "none" / "cell")
        (out / "none" / "cell" / "result.json").unlink()
        assert len(find([out])) == 1


def test_a_cache_with_torn_markers_is_listed(tmp_path: Path, call: Call) -> None:
    for number, text in enumerate(("", "[]", "{}", '{"config": {"kind": "sft"}, "made_by": 1}')):
        (tmp_path / "stages" / str(number)).mkdir(parents=True)
        (tmp_path / "stages" / str(number) / "stage.json").write_text(text)
    (tmp_path / "evaluations").mkdir()
    for name, text in (("a", '{"lines": 0}\n'), ("b", "[]\n"), ("c", "{")):
        (tmp_path / "evaluations" / f"{name}.jsonl").write_text(text)
    done = call("cache", "ls", tmp_path)
    assert (done.code, done.err) == (0, "")
    assert done.out.count("not all there") == 7
