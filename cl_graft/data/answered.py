"""Tasks of TRACE (arXiv 2310.06762): `train.json` and `test.json` of `{prompt, answer}` rows in a folder a task.

Its `eval.json` is never read.
"""

from __future__ import annotations

from pathlib import Path

from cl_graft.data.folders import folder_of
from cl_graft.data.parts import Parts, parts
from cl_graft.data.readers import DataError, records
from cl_graft.task import Example

ROOTS = ("trace", "TRACE", "LLM-CL-Benchmark_5000", "LLM-CL-Benchmark_500", "TRACE-Benchmark", "")
WHERE = "TRACE's archive is linked from github.com/BeyonderXX/TRACE, the hub is not known to hold it: unpack it there"


def read(folder: str, data_dir: Path | None) -> Parts:
    """All examples of a task, prompts and answers as they are written. Raises DataError."""
    if data_dir is None:
        raise DataError(f"trace reads {folder}/train.json and test.json; {WHERE} with --data-dir.")
    place = folder_of(data_dir, ROOTS, folder, WHERE)
    found: dict[str, list[Example]] = {}
    for part in ("train", "test"):
        rows = records(data_dir, f"{place}/{part}.json", {"prompt": str, "answer": str})
        for number, row in enumerate(rows, 1):
            if not row["answer"].strip():
                raise DataError(
                    f"{data_dir / place / part}.json, record {number} has no answer; fill it or remove the row."
                )
        found[part] = [Example(row["prompt"], row["answer"]) for row in rows]
    return parts(folder, found["train"], found["test"])
