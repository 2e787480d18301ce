"""CL-Graft from Python: a sweep as a call, results as a DataFrame, a matrix in a notebook, and the page that says so."""

from __future__ import annotations

import inspect
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import cl_graft
from cl_graft.bench.report import make
from cl_graft.matrix import METRICS
from cl_graft.report import find

DOCS = Path(__file__).parents[1] / "docs"


def test_a_row_a_cell(tmp_path: Path) -> None:
    make(tmp_path, cells=6, examples=4, strategies=3, scenarios=2)
    frame = cl_graft.results(tmp_path)
    assert len(frame) == 6 and frame["complete"].all()
    assert set(frame["task_ids"]) == {"given", "inferred (ridge)", "not needed"}
    assert set(METRICS) < set(frame.columns)
    for found, (_, row) in zip(find([tmp_path]), frame.iterrows(), strict=True):
        cell = found.cell
        assert (row["op"], row["label"], row["seed"]) == (
            cell["metrics"]["op"],
            cell["label"],
            cell["seed"],
        )
        assert row["bytes_alive"] == cell["alive_bytes"][-1]
        assert row["storage"] == pytest.approx(
            100 * cell["alive_bytes"][-1] / (3 * cell["base_bytes"])
        )
        assert (row["train_s"], row["folder"]) == (cell["seconds"]["train"], str(found.path))
        assert math.isnan(row["general"])  # it was not measured
    assert list(cl_graft.results([tmp_path])["op"]) == list(frame["op"])


def test_a_row_an_entry_of_a_matrix(tmp_path: Path) -> None:
    make(tmp_path, cells=2, examples=4, strategies=2, scenarios=1)
    frame = cl_graft.results(str(tmp_path), scores=True)
    assert len(frame) == 2 * 4 * 3
    one = frame[(frame.strategy == "graftllm") & (frame.row == 2)]
    assert list(one["learned"]) == ["code"] * 3 and list(one["task"]) == ["math", "code", "cipher"]
    cell = next(f.cell for f in find([tmp_path]) if f.cell["strategy"] == "graftllm")
    assert list(one["score"]) == cell["matrix"][2]
    assert list(one["n"]) == cell["n"][2] == [4, 4, 4]
    assert set(frame[frame.row == 0]["learned"]) == {""}


def test_no_cells_are_no_results(tmp_path: Path) -> None:
    with pytest.raises(cl_graft.CLGraftError, match="holds no cell"):
        cl_graft.results(tmp_path)


SCRIPT = """
import cl_graft

small = {"mini": {"steps": 2, "test_size": 4, "train_size": 16, "tasks": "math,cipher"}}
said = []
frame = cl_graft.sweep(
    scenarios=[small], strategies=["sequential", "magnitude"], models="nano-llama", wandb="off", out="out",
    workers=2, progress=lambda *about: said.append(about[0]),
)
assert sorted(frame["strategy"]) == ["magnitude", "sequential"] and frame["complete"].all()
assert len(set(said)) >= 2
again = cl_graft.sweep("out/sweep.yaml", out="out")  # what is finished is not computed again
assert list(again["op"]) == list(frame["op"]) and list(again["spent_s"]) == list(frame["spent_s"])
try:
    cl_graft.sweep(scenarios="mini", strategies="loar", out="out")
except cl_graft.CLGraftError as error:
    assert "lora" in str(error)
print("ran once")
"""


@pytest.mark.slow
def test_a_sweep_is_a_call_of_a_script_that_has_no_guard(tmp_path: Path) -> None:
    """Python has processes that are started run the script again, unless it says `if __name__ == "__main__"`."""
    (tmp_path / "study.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "study.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(cl_graft.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ran once\n"), done.stderr


class Page(HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.cells: list[tuple[str, str]] = []  # style, text
        self.styles: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("table", "thead", "tbody", "tr", "th", "td", "caption", "small")
        if tag == "td":
            self.cells.append((dict(attrs).get("style") or "", ""))

    def handle_data(self, data: str) -> None:
        if self.cells:
            style, text = self.cells[-1]
            self.cells[-1] = style, text + data


def test_a_matrix_is_a_table_in_a_notebook() -> None:
    """More is bluer, what was just learned has a frame, nothing is fetched, and a name is text."""
    rows = [[0.0, 0.3], [0.8, None], [0.6, 0.7]]
    matrix = cl_graft.PerformanceMatrix(rows, ["math", "<b>"], stderr=[[0.01] * 2] * 3)
    text = matrix._repr_html_()
    cells = Page(text).cells
    assert [told.split()[0] for _, told in cells][:5] == ["0.0", "30.0", "80.0", "–after", "60.0"]
    shades = [
        float(found[1]) if (found := re.search(r",([\d.]+)\)", style)) else None
        for style, _ in cells
    ]
    assert shades == [0.0, 0.18, 0.48, None, 0.36, 0.42]
    assert ["outline" in style for style, _ in cells] == [False, False, True, False, False, True]
    assert (
        "&lt;b&gt;" in text and "<b>" not in text and "http" not in text and "<script" not in text
    )
    assert "OP 65.0" in text and "± 1.0" in text
    assert "BWT" not in cl_graft.PerformanceMatrix([[0.1], [0.2]], ["math"])._repr_html_()


def test_the_page_has_every_public_name_with_its_signature() -> None:
    """`cl_graft.__all__` and the page say the same; every parameter on the page is one."""
    text = (DOCS / "api.md").read_text()
    told = dict(re.findall(r"^## `cl_graft\.(\w+)(\([^`]*\))?`", text, re.MULTILINE))
    assert set(told) == {*cl_graft.__all__} - {"__version__"}
    for name, signature in told.items():
        public = getattr(cl_graft, name)
        assert public.__doc__
        known = inspect.signature(public).parameters if signature else ()
        for parameter in re.findall(r"(\w+)(?==|,|\))", re.sub(r'"[^"]*"', "", signature)):
            assert parameter in (*known, "None", "False", "True"), (name, parameter)
    for name in re.findall(r"`PerformanceMatrix\.(\w+)`", text):
        assert hasattr(cl_graft.PerformanceMatrix, name)


def test_the_columns_that_the_page_names_are_there(tmp_path: Path) -> None:
    make(tmp_path, cells=1, examples=4, strategies=1, scenarios=1)
    text = (DOCS / "api.md").read_text()
    for scores, title in ((False, "a row a cell"), (True, "a row an entry")):
        (line,) = re.findall(rf"^Columns, {title}: (.*)$", text, re.MULTILINE)
        named = re.findall(r"`(\w+)`", line)
        assert named == list(cl_graft.results(tmp_path, scores=scores).columns)
