"""The score of always giving the most frequent answer stands beside the scores."""

from __future__ import annotations

import json
from pathlib import Path

from cl_graft.report.frequent import frequent_note, with_frequent
from cl_graft.store import prompts


def kept(out: Path, data: str, **tasks: str) -> None:
    """A file of test examples, whose references are the letters."""
    file = prompts.file(out, data)
    file.parent.mkdir(exist_ok=True)
    lines = [
        {"task": task, "index": i, "prompt": f"p{i}", "reference": answer}
        for task, answers in tasks.items()
        for i, answer in enumerate(answers)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_share_of_the_most_frequent_answer_of_each_task_and_its_mean_over_data(
    tmp_path: Path,
) -> None:
    kept(tmp_path, "first", labels="aaab", sums="abcd")
    kept(tmp_path, "second", labels="aabb", sums="abcd")
    tasks = ["labels", "sums"]
    of = {"one": "first", "again": "first", "other": "second", "older": "gone"}
    cells = with_frequent(
        {tmp_path / name: {"data": data, "tasks": tasks} for name, data in of.items()}
    )
    assert [cell["frequent"] for cell in cells] == [{"labels": 0.75}] * 2 + [{"labels": 0.5}, {}]
    # once for each data, not for each cell: (75 + 50) / 2; of four different answers none is frequent
    assert frequent_note(cells) == " Always the most frequent answer of the test: labels 62.5."
    assert frequent_note([{"data": "gone", "tasks": tasks}]) == ""
