"""What the test examples asked: kept once for all cells of the same data, beside them, for their reports.

<out>/data/<fingerprint>.jsonl    a line a test example: task, index, prompt, reference and, if it has one, suite
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .record import read_jsonl, write_text
from .task import Example, Scenario


@dataclass(frozen=True)
class Asked:
    """A test example as a reader wants it. reference: the answer, and for programs their tests."""

    prompt: str
    reference: str
    suite: str = ""


def keep(out: Path, fingerprint: str, scenario: Scenario) -> None:
    """Write the scenario's test examples, unless they are there. Raises RecordError if the disk refuses them."""
    path = file(out, fingerprint)
    if path.is_file():
        return
    examples = {task.name: task.test for task in scenario.tasks}
    if scenario.general:
        examples[f"general:{scenario.general.name}"] = scenario.general.test
    lines = [
        {"task": task, "index": i, "prompt": e.prompt, "reference": _reference(e)}
        | ({"suite": e.suite} if e.suite else {})
        for task, those in examples.items()
        for i, e in enumerate(those)
    ]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def recall(out: Path, fingerprint: str) -> dict[str, list[Asked]]:
    """{task: its test examples}; empty where none were kept, as by earlier versions."""
    found: dict[str, list[Asked]] = {}
    path = file(out, fingerprint)
    for line in read_jsonl(path) if path.is_file() else ():
        asked = Asked(line["prompt"], line["reference"], line.get("suite", ""))
        found.setdefault(line["task"], []).append(asked)
    return found


def file(out: Path, fingerprint: str) -> Path:
    """Where they are kept."""
    return out / "data" / f"{fingerprint}.jsonl"


def _reference(example: Example) -> str:
    return "\n".join(part for part in (example.completion, *example.tests) if part)
