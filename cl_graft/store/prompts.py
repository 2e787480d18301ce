"""What the test examples asked: kept once for all cells of the same data, beside them, for their reports.

<out>/data/<fingerprint>.jsonl    a line a test example: task, index, prompt, reference and, if it has one, suite
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_graft.store.files import RecordError, read_jsonl, write_text
from cl_graft.store.locks import locked
from cl_graft.task import Example, Scenario

FOLDER = "data"


@dataclass(frozen=True)
class Asked:
    """A test example as a reader wants it. reference: the answer, and for programs their tests."""

    prompt: str
    reference: str
    suite: str = ""


def keep(out: Path, fingerprint: str, scenario: Scenario) -> Path:
    """The file with the scenario's test examples, written if need be. Raises DiskRefused if the disk does."""
    path = file(out, fingerprint)
    if not path.is_file():
        with locked(path):
            write_text(path, "".join(json.dumps(line) + "\n" for line in _lines(scenario)))
    return path


def _lines(scenario: Scenario) -> Iterator[dict[str, Any]]:
    examples = {task.name: task.test for task in scenario.tasks}
    if scenario.general:
        examples[f"general:{scenario.general.name}"] = scenario.general.test
    for task, those in examples.items():
        for i, e in enumerate(those):
            line = {"task": task, "index": i, "prompt": e.prompt, "reference": _reference(e)}
            yield line | ({"suite": e.suite} if e.suite else {})


def recall(out: Path, fingerprint: str) -> dict[str, list[Asked]]:
    """{task: its test examples}; empty where none were kept, as by earlier versions, or not all can be read."""
    by_task: dict[str, list[Asked]] = {}
    path = file(out, fingerprint)
    try:
        for line in read_jsonl(path) if path.is_file() else ():
            asked = Asked(line["prompt"], line["reference"], line.get("suite", ""))
            by_task.setdefault(line["task"], []).append(asked)
    except (RecordError, KeyError, TypeError, AttributeError):
        return {}
    return by_task


def file(out: Path, fingerprint: str) -> Path:
    """The file in which the prompts of this data are kept."""
    return out / FOLDER / f"{fingerprint}.jsonl"


def _reference(example: Example) -> str:
    return "\n".join(part for part in (example.completion, *example.tests) if part)
