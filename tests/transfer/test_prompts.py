"""Prompts: from files, scenarios and elsewhere, and the rule that comes with them."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_graft import plugins
from cl_graft.data import DataError
from cl_graft.errors import CLGraftError, UnknownName
from cl_graft.task import Example, Scoring
from cl_graft.transfer.config import BuildConfig
from cl_graft.transfer.prompts import Prompts, read_prompts

Write = Callable[..., Path]
TESTS = ["assert f(1) == 2", "assert f(2) == 3"]


def read(prompts: object, **changes) -> Prompts:
    given = {"sources": ("x",), "prompts": str(prompts), "out": Path("o"), **changes}
    return read_prompts(BuildConfig(**given))


def test_three_kinds_of_file_hold_the_same(tmp_path: Path, write: Write) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"prompt": "a,\n b", "completion": "1"}, {"prompt": "ü", "completion": "2"}]
    files = [write(rows), tmp_path / "p.csv", tmp_path / "p.parquet", tmp_path / "p.json"]
    with open(files[1], "w", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(rows)
    parquet.write_table(pyarrow.Table.from_pylist(rows), files[2])
    files[3].write_text(json.dumps(rows))
    for file in files:
        found = read(file, task="number")
        assert found.examples == (Example("a,\n b", "1"), Example("ü", "2"))
        assert (found.rule, found.max_new_tokens, found.chat) == (Scoring("number"), 512, None)


def test_a_folder_of_json_lines_is_read_as_it_is_written(tmp_path: Path) -> None:
    """`datasets` (5.2) would make a datetime of the answer."""
    row = {"prompt": "When?", "completion": "2024-01-05"}
    (tmp_path / "train.jsonl").write_text(json.dumps(row) + "\n")
    assert read(tmp_path, task="exact").examples == (Example("When?", "2024-01-05"),)


def test_tests_and_setup(tmp_path: Path, write: Write) -> None:
    row = {"prompt": "p", "tests": TESTS, "setup": "import math"}
    assert read(write([row]), task="tests").examples == (
        Example("p", "", tests=tuple(TESTS), setup="import math"),
    )
    with open(tmp_path / "p.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "tests"], ["p", json.dumps(TESTS)]])
    assert read(tmp_path / "p.csv", task="tests").examples[0].tests == tuple(TESTS)


def test_a_scenarios_task_brings_its_rule_and_length() -> None:
    make = plugins.load("scenario", "mini")
    task = make(seed=3, tasks="math", train_size=60, test_size=8).tasks[0]
    options = {"mini": {"train_size": 60, "test_size": 8}}
    found = read("mini/math", seed=3, options=options)
    assert found.examples == tuple(dict.fromkeys(task.train))
    assert (found.rule, found.max_new_tokens) == (Scoring("number"), 32)
    assert read("mini/math", seed=3, options=options, max_new_tokens=9).max_new_tokens == 9
    assert read("mini/math", seed=3, options=options, limit=5).examples == found.examples[:5]


def test_a_file_under_a_scenarios_task(write: Write) -> None:
    found = read(write([{"prompt": "p", "completion": "xyz"}]), task="mini/cipher")
    assert (found.rule, found.max_new_tokens) == (Scoring("exact"), 32)


def test_the_first_of_equal_prompts_stays(write: Write) -> None:
    rows = [{"prompt": p, "completion": c} for p, c in (("a", "1"), ("b", "2"), ("a", "3"))]
    found = read(write([*rows, rows[0]]), task="exact")
    assert found.examples == (Example("a", "1"), Example("b", "2"))
    assert found.duplicates == 2


def test_with_a_reward_model_a_row_needs_no_reference(write: Write) -> None:
    rows = [{"prompt": "a", "completion": 5}, {"prompt": "b"}, {"prompt": "c", "completion": None}]
    found = read(write(rows), task="number", reward_model="r")
    assert found.examples == (Example("a", "5"), Example("b", ""), Example("c", ""))
    assert read(write([{"prompt": "a"}]), reward_model="r").rule is None


@pytest.mark.parametrize(
    ("rows", "task", "told"),
    [
        ([{"prompt": "a", "completion": "1"}, {"prompt": "b", "answer": "1"}], "number", "line 2 has no column 'completion'; its columns are 'prompt', 'answer'"),
        ([{"question": "a"}], "exact", "line 1 has no column 'prompt'; its columns are 'question'"),
        ([{"prompt": "a", "completion": "1"}], "tests", "line 1 has no column 'tests'"),
        ([{"prompt": "a", "tests": []}], "tests", "line 1 has nothing in 'tests'"),
        ([{"prompt": "a", "tests": ["assert f( == 1"]}], "tests", "line 1 has no list of Python asserts"),
        ([{"prompt": "a", "tests": "assert f(1)"}], "tests", "line 1 has no list of Python asserts"),
        ([{"prompt": 7, "completion": "1"}], "exact", "line 1 has int in column 'prompt'"),
        ([{"prompt": " ", "completion": "1"}], "exact", "line 1 has an empty prompt"),
        ([{"prompt": "a", "completion": "five"}], "number", "line 1 has no number in its completion 'five'"),
        (["text"], "exact", "line 1 is no object"),
        ([], "exact", "holds no prompt"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(rows: list, task: str, told: str, write: Write) -> None:
    with pytest.raises(DataError) as refused:
        read(write(rows), task=task)
    assert told in str(refused.value) and "prompts.jsonl" in str(refused.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "a", "completion": "1"}\n{"prompt"')
    (tmp_path / "a.parquet").write_text("no parquet")
    (tmp_path / "a.txt").write_text("text")
    for name, told in (
        ("a.jsonl", "line 2 is not JSON"),
        ("a.parquet", "cannot be read"),
        ("a.txt", "of no known kind"),
        ("b.jsonl", "there is no file"),
    ):
        with pytest.raises(DataError, match=told):
            read(tmp_path / name, task="exact")


@pytest.mark.parametrize(
    ("given", "kind", "told"),
    [
        ({"prompts": "mini/maths"}, UnknownName, "did you mean math"),
        ({"prompts": "mni/math"}, DataError, "did you mean mini/math"),
        ({"prompts": "nonsense"}, UnknownName, "there is no prompts named 'nonsense'"),
        ({"prompts": "mini/math", "task": "nmber"}, UnknownName, "did you mean number"),
        ({"prompts": "mini/math", "options": {"mnii": {}}}, UnknownName, "did you mean mini"),
        ({"prompts": "mini/math", "options": {"mini": {"stps": 1}}}, UnknownName, "steps"),
    ],
)
def test_misspelt_names(
    given: dict, kind: type[CLGraftError], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(name: str, **given: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(kind) as refused:
        read(**given)
    assert told in str(refused.value)


def test_a_data_set_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset

    def served(name: str, split: str) -> Dataset:
        assert (name, split) == ("owner/questions", "train")
        return Dataset.from_list([{"prompt": "a", "completion": "1"}, {"prompt": "b"}])

    monkeypatch.setattr("datasets.load_dataset", served)
    assert read("owner/questions", task="exact", reward_model="r").examples[0] == Example("a", "1")
    with pytest.raises(DataError, match="owner/questions, row 2 has nothing in 'completion'"):
        read("owner/questions", task="exact")


def test_nothing_says_how_to_judge(write: Write) -> None:
    with pytest.raises(
        DataError, match="give --task .*exact, .*math, .*number.* or a --reward-model"
    ):
        read(write([{"prompt": "a"}]))
