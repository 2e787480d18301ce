"""Task files of lm-evaluation-harness are data: what would run code, or fetch some, is refused before lm-eval sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_graft.data import harness, harness_files
from cl_graft.errors import CLGraftError
from tests.refusals import one_sentence

PLAIN = """
task: sums
include: common.yaml
doc_to_text: "{{a}} + {{b}} ="
doc_to_target: "{{a + b}}"
generation_kwargs: {until: ["\\n"], do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
COMMON = """
task: common
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl, train: [rows.jsonl, elsewhere.jsonl]}}
test_split: test
metadata: {version: 2.0}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "sums.yaml").write_text(PLAIN)
    (tmp_path / "common.yaml").write_text(COMMON)
    (tmp_path / "rows.jsonl").write_text('{"a": 1, "b": 2}\n')
    return tmp_path


def test_a_file_with_what_it_includes(folder: Path) -> None:
    """Its own keys come over the included ones; data beside it are found from anywhere, as lm-eval does not."""
    keys, rows = harness_files.read(folder / "sums.yaml"), str(folder / "rows.jsonl")
    assert (keys["task"], keys["test_split"], keys["metadata"]) == (
        "sums",
        "test",
        {"version": 2.0},
    )
    files = {"test": rows, "train": [rows, "elsewhere.jsonl"]}
    assert keys["dataset_kwargs"] == {"data_files": files}
    found = [file.name for file in harness_files.files(folder / "sums.yaml")]
    assert sorted(found) == ["common.yaml", "rows.jsonl", "sums.yaml"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("process_docs: !function code.f", "line 8 has !function code.f, which runs code"),
        ("metric_list: [{metric: !function code.f}]", "which runs code"),
        ("doc_to_text: !!python/name:os.sep x", "is not YAML"),
        ("class: code.Task", "it names a class"),
        ("custom_dataset: code.f", "it names a function"),
        ("process_results: code.f", "it names a function"),
        ("use_prompt: promptsource:x", "it fetches a template"),
        ("unsafe_code: true", "outside the sandbox"),
        ("metric_list: [{metric: mine, hf_evaluate: true}]", "a program that is downloaded"),
        ("dataset_kwargs: {trust_remote_code: true}", "never given"),
        ("dataset_kwargs: {builder: x}", "no key of dataset_kwargs"),
        ("generation_kwargs: {custom_generate: owner/code}", "no key of generation_kwargs"),
        ("generation_kwargs: {trust_remote_code: true}", "no key of generation_kwargs"),
        ("fewshot_config: {process_docs: code.f}", "no key of fewshot_config"),
        ("dataset_path: pandas", "reads pickles"),
        ("doc_to_txt: x", "did you mean doc_to_text"),
        ("include: sums.yaml", "includes itself"),
        ("include: none.yaml", "none.yaml cannot be read"),
        ("task: [a, b]", "names no single task"),
        ("task: ../up", "names no single task"),
        ("metadata: 2024-99-99", "is not YAML"),
        ("a: [", "is not YAML"),
    ],
)
@pytest.mark.parametrize("included", [False, True])
def test_what_is_no_data_is_refused_wherever_it_stands(
    folder: Path, line: str, words: str, included: bool
) -> None:
    (folder / "code.py").write_text("raise SystemExit('ran')")
    file, inner = folder / "sums.yaml", folder / "common.yaml"
    place = inner if included else file
    if included and line.startswith("task"):
        line = f"{line}\ninclude: x.yaml"
        (folder / "x.yaml").write_text("a: [")
        words = "is not YAML"
    place.write_text(place.read_text() + line + "\n")
    if line.startswith("process_docs"):
        number = len(place.read_text().splitlines())
        words = words.replace("line 8", f"line {number}")
    assert words in one_sentence(lambda: harness_files.read(file))


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("a", [("a", "", None)]),
        ("a:acc_norm, b@20,a:m/f@3", [("a", "acc_norm", None), ("b", "", 20), ("a", "m/f", 3)]),
        ("./x.yaml,a,a", [("in/x.yaml", "", None), ("a", "", None)]),
        ("", []),
    ],
)
def test_tasks_as_a_command_line_names_them(said: str, told: list) -> None:
    assert list(harness.parts(said, Path("in"))) == told


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    message = one_sentence(lambda: harness.general(["hellaswag"]))
    assert "run `pip install cl-graft[lm-eval]`" in message


@pytest.mark.parametrize("said", ["a@", "a@0", "a@x", "a@-1"])
def test_a_number_of_documents_that_is_none(said: str) -> None:
    with pytest.raises(CLGraftError, match="write a number there, as a@200"):
        list(harness.parts(said))
