"""What was asked, kept beside the cells for their reports."""

from __future__ import annotations

from pathlib import Path

from cl_graft.store import prompts
from cl_graft.task import Scenario


def test_questions_are_kept_once_and_recalled(tiny_scenario: Scenario, tmp_path: Path) -> None:
    file = prompts.keep(tmp_path, "abc", tiny_scenario)
    written = file.stat().st_mtime_ns
    assert prompts.keep(tmp_path, "abc", tiny_scenario) == file
    assert file.stat().st_mtime_ns == written
    found = prompts.recall(tmp_path, "abc")
    assert list(found) == ["math", "cipher", f"general:{tiny_scenario.general.name}"]
    for task in tiny_scenario.tasks:
        assert [(a.prompt, a.reference) for a in found[task.name]] == [
            (e.prompt, e.completion) for e in task.test
        ]
    assert prompts.recall(tmp_path, "another") == {}


def test_what_a_killed_process_left_half_written_goes(
    tiny_scenario: Scenario, tmp_path: Path
) -> None:
    half = tmp_path / prompts.FOLDER / ".abc.jsonl.7.tmp"
    half.parent.mkdir()
    half.touch()
    prompts.keep(tmp_path, "abc", tiny_scenario)
    assert not half.exists()
