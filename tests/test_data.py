"""Data files of the user: read if every record is what the scenario needs, else named with file, line and cure."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_graft import plugins
from cl_graft.data import DataError, labels, records, sample
from tests.refusals import one_sentence

ROWS = [{"q": "one?", "a": 1}, {"q": "zwei – ü?", "a": 2.5, "more": None}]

refusal = partial(one_sentence, kind=DataError, ends=".")


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- what is read ---


def test_json_lines_and_lists_plain_and_compressed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines(ROWS), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines(ROWS).encode()))
    for name in ("a.jsonl", "b.json", "c.jsonl.gz"):
        assert records(tmp_path, name, ("q", "a")) == ROWS
        assert records(tmp_path, name, {"q": str, "a": (int, float)}) == ROWS


@pytest.mark.parametrize(
    "text",
    [
        lines(ROWS).rstrip("\n"),
        "\n" + lines(ROWS).replace("\n", "\n\n"),
        lines(ROWS).replace("\n", "\r\n"),
        "\ufeff" + lines(ROWS),
    ],
)
def test_blank_lines_foreign_line_ends_and_a_byte_order_mark_do_no_harm(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "a.jsonl").write_bytes(text.encode())
    assert records(tmp_path, "a.jsonl", ("q",)) == ROWS


def test_labels(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('["Good", "Bad"]')
    assert labels(tmp_path, "labels.json") == ["Good", "Bad"]


# --- what is refused ---


def test_no_data_folder_is_answered_with_the_option() -> None:
    for read in (lambda: records(None, "x/a.jsonl", ("q",)), lambda: labels(None, "x/a.jsonl")):
        message = refusal(read)
        assert "x/a.jsonl" in message and "--data-dir" in message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    message = refusal(lambda: records(tmp_path, "x/a.jsonl", ("q",)))
    assert str(tmp_path / "x" / "a.jsonl") in message and "--data-dir" in message


@pytest.mark.parametrize("broken", ["{", '{"q": "a", "a": }', "junk", '{"q": 1} {"q": 2}'])
def test_a_broken_line_is_named(tmp_path: Path, broken: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(lines(ROWS) + "\n" + broken + "\n" + lines(ROWS))
    message = refusal(lambda: records(tmp_path, "a.jsonl", ("q",)))
    assert f"{file}, line 4 is not JSON" in message and "mend or remove the line" in message


@pytest.mark.parametrize("record", ['{"a": 1}', "[]", "3", "null", '"q"'])
def test_a_missing_field_is_named(tmp_path: Path, record: str) -> None:
    """In a file of lines by its line, blank ones counted; in a list by its number."""
    (tmp_path / "a.jsonl").write_text(lines(ROWS) + "\n" + record + "\n")
    message = refusal(lambda: records(tmp_path, "a.jsonl", ("a", "q")))
    assert "a.jsonl, line 4 has no field" in message and "needs a, q" in message
    (tmp_path / "b.json").write_text(json.dumps([*ROWS, json.loads(record)]))
    message = refusal(lambda: records(tmp_path, "b.json", ("a", "q")))
    assert "b.json, record 3 has no field" in message


@pytest.mark.parametrize("value", [None, 3, ["text"], {"text": 1}])
def test_a_field_of_another_type_is_named(tmp_path: Path, value: Any) -> None:
    (tmp_path / "a.jsonl").write_text(lines([*ROWS, {"q": value, "a": 1}]))
    message = refusal(lambda: records(tmp_path, "a.jsonl", {"q": str, "a": (int, float)}))
    assert f"line 3 has {type(value).__name__} in field 'q'; write str there" in message


def test_two_types_are_both_offered(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"a": "1"}]))
    message = refusal(lambda: records(tmp_path, "a.jsonl", {"a": (int, float)}))
    assert "line 1 has str in field 'a'; write int or float there" in message


@pytest.mark.parametrize("text", ["", "\n\n", "[]"])
def test_a_file_without_records_is_refused(tmp_path: Path, text: str) -> None:
    name = "a.json" if text == "[]" else "a.jsonl"
    (tmp_path / name).write_text(text)
    assert "holds no record" in refusal(lambda: records(tmp_path, name, ("q",)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", b"{"),
        ("a.json", b"{}"),
        ("a.jsonl", b'{"q": "\xff"}\n'),
        ("a.jsonl.gz", b"no gzip"),
        ("a.jsonl.gz", gzip.compress(lines(ROWS).encode(), mtime=0)[:-9]),
    ],
    ids=["torn", "no list", "no text", "no gzip", "cut gzip"],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    message = refusal(lambda: records(tmp_path, name, ("q",)))
    assert str(tmp_path / name) in message and "mend or replace" in message


@pytest.mark.parametrize("text", ["[]", "{}", "3", '["a", 1]', '"Good"', "["])
def test_labels_are_a_list_of_strings(tmp_path: Path, text: str) -> None:
    (tmp_path / "labels.json").write_text(text)
    assert "labels.json" in refusal(lambda: labels(tmp_path, "labels.json"))


# --- the same, as a scenario meets it ---


@pytest.fixture
def sst2(tmp_path: Path) -> Path:
    """A data folder with four records of one classification set."""
    folder = tmp_path / "cl_benchmark" / "SC" / "SST-2"
    folder.mkdir(parents=True)
    for name in ("train", "test"):
        rows = [
            {"sentence": f"{name} text {i}", "label": "Good" if i % 2 else "Bad"} for i in range(4)
        ]
        (folder / f"{name}.json").write_text(json.dumps(rows))
    (folder / "labels.json").write_text('["Good", "Bad"]')
    return tmp_path


def classification(data_dir: Path | None, **options: Any) -> Any:
    make = plugins.load("scenario", "text_classification")
    return make(seed=0, data_dir=data_dir, tasks="sst2", **options)


def test_a_label_that_is_not_listed_is_named(sst2: Path) -> None:
    assert len(classification(sst2).tasks[0].train) == 4
    file = sst2 / "cl_benchmark" / "SC" / "SST-2" / "train.json"
    file.write_text('[{"sentence": "x", "label": "Good"}, {"sentence": "x", "label": "Fine"}]')
    message = refusal(lambda: classification(sst2))
    assert f"{file}, record 2 has label 'Fine'" in message and "labels.json" in message


def test_a_pair_that_is_cut_keeps_what_is_asked_of_it(tmp_path: Path) -> None:
    """Texts are cut to 320 characters; of MNLI's the start goes, since the hypothesis is at the end."""
    folder = tmp_path / "cl_benchmark" / "NLI" / "MNLI"
    folder.mkdir(parents=True)
    asked = "sentence 2: It is always possible."
    for name in ("train", "test"):
        text = f"sentence 1: {'so so ' * 100}{name}\n{asked}"
        (folder / f"{name}.json").write_text(json.dumps([{"sentence": text, "label": "neutral"}]))
    (folder / "labels.json").write_text('["neutral", "entailment", "contradiction"]')
    make = plugins.load("scenario", "text_classification")
    (task,) = make(seed=0, data_dir=tmp_path, tasks="mnli").tasks
    text = task.test[0].prompt.removesuffix("\nLabel:")
    assert text.endswith(asked) and len(text) == 320


def test_undecided_labels_are_left_out(sst2: Path) -> None:
    """MNLI marks pairs without consensus by `-`."""
    file = sst2 / "cl_benchmark" / "SC" / "SST-2" / "test.json"
    file.write_text('[{"sentence": "x", "label": "-"}, {"sentence": "y", "label": "Good"}]')
    (example,) = classification(sst2).tasks[0].test
    assert example.prompt.startswith("y") and example.completion == " Good"
    assert example.choices == (" Good", " Bad")


@pytest.mark.parametrize("option", ["train_size", "test_size"])
def test_an_empty_sample_is_refused(sst2: Path, option: str) -> None:
    for size in (0, -5):
        assert "ask for at least 1" in refusal(lambda n=size: classification(sst2, **{option: n}))


def test_real_scenarios_ask_for_the_data_folder() -> None:
    assert "--data-dir" in refusal(lambda: classification(None))
    make = plugins.load("scenario", "math_then_code")
    assert "--data-dir" in refusal(lambda: make(seed=0, data_dir=None))


# --- sampling ---


@settings(deadline=None)
@given(st.lists(st.integers(), min_size=1), st.integers(1, 20), st.text(max_size=5))
def test_a_sample_is_part_of_the_items_and_the_seeds_alone(
    items: list[int], size: int, seed: str
) -> None:
    found = sample(items, size, seed)
    assert len(found) == min(size, len(items))
    assert not Counter(found) - Counter(items)
    assert found == sample(items, size, seed)


def test_another_seed_gives_another_sample() -> None:
    items = list(range(1000))
    assert sample(items, 10, "a") != sample(items, 10, "b")
    assert sample(items, 1000, "a") != items


def test_nothing_cannot_be_sampled() -> None:
    assert "'train/0/x' is empty" in refusal(lambda: sample([], 5, "train/0/x"))
