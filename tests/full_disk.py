"""A disk that is full from any write of a run on: `python -m tests.full_disk --out FOLDER` tries every one.

It takes about two runs of a small cell a write, and writes full_disk.md and full_disk.json.
"""

from __future__ import annotations

import argparse
import errno
import json
import re
import shutil
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_graft.config import Launch, RunConfig
from cl_graft.store.digests import machine, versions
from tests import faults, kills

ALWAYS = 10**9  # more writes than any run asks for


@dataclass
class Reference:
    """An undisturbed cell: its numbers, how often it asks the disk for something, and its results folder."""

    numbers: Any
    count: int
    out: Path


def config(scenario: Path, out: Path) -> RunConfig:
    """A task of a step, and two of preferences, each with a checkpoint."""
    made = kills.Subject("individual").config(scenario, out)
    small = {scenario.stem: {"dpo": True, "steps": 1, "tasks": "math"}}
    return made.model_copy(update={"options": small, "launch": Launch(save_steps=1)})


def told(server: Any, target: Any, *arguments: Any) -> Any:
    """What a process says that runs `target`."""
    hears, says = server.Pipe(duplex=False)
    process = server.Process(target=target, args=(says, *arguments))
    process.start()
    says.close()
    try:
        return hears.recv()
    finally:
        process.join()


def reference(server: Any, scenario: Path, out: Path) -> Reference:
    made = config(scenario, out)
    count, said, _ = told(server, faults.on_a_disk, [made], ALWAYS, errno.ENOSPC)
    assert said == ""
    return Reference(kills.numbers(made.out / made.cell), count, made.out)


def finished(out: Path) -> dict[Path, bytes]:
    """What no continued run may write again: stages of the cell, and of the cache."""
    markers = [*out.rglob("stage.json"), *out.rglob("experience.json")]
    return {f: f.read_bytes() for m in markers for f in m.parent.iterdir() if f.is_file()}


def refused(server: Any, scenario: Path, room: int, undisturbed: Reference, out: Path) -> str:
    """Run a cell on a disk that refuses from write number `room` on, and again when there is room; what was refused.

    The run says one sentence, what was finished is whole and stays as it is, and the end is the same numbers: else
    AssertionError.
    """
    made = config(scenario, out)
    _, said, place = told(server, faults.on_a_disk, [made], room, errno.ENOSPC)
    assert "No space left" in said or "disk is full" in said, (room, said)
    assert "\n" not in said and said.endswith("."), (room, said)
    kills.assert_whole(made.out)
    before = finished(made.out)
    assert told(server, faults.on_a_disk, [made], ALWAYS, errno.ENOSPC)[1] == "", room
    assert finished(made.out).items() >= before.items(), room
    kills.assert_done(made.out)
    assert kills.numbers(made.out / made.cell) == undisturbed.numbers, room
    return place


KINDS = {
    "cache/stages/.*checkpoint-": "step checkpoints",
    "cache/stages/.*work": "a stage at work",
    "cache/stages": "finished stages",
    "cache/evaluations": "evaluations",
    "cache/pairs": "preference pairs",
    "data": "data sets",
    "experiences": "an experience's scores and answers",
    "packs": "packs",
    "\\.?(cell|state|result)\\.json": "a cell's records",
}


def kind(place: str, out: Path) -> str:
    """What a place in a results folder holds."""
    inside = str(Path(place).relative_to(out)) if Path(place).is_relative_to(out) else place
    inside = re.sub(r"^moving__[^/]*/", "", inside)
    return next((k for pattern, k in KINDS.items() if re.match(pattern, inside)), "folders")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.full_disk", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="full_disk.md and .json go here")
    parser.add_argument("--work", type=Path, help="where the runs are (default: OUT/work)")
    asked = parser.parse_args()
    work, begun = asked.work or asked.out / "work", time.monotonic()
    server, scenario = kills.server(), kills.write_scenario(work / "scenario")
    undisturbed = reference(server, scenario, work / "reference")
    tried, failed = Counter[str](), dict[int, str]()
    for room in range(1, undisturbed.count + 1):
        out = work / str(room)
        try:
            tried[kind(refused(server, scenario, room, undisturbed, out), out)] += 1
        except AssertionError as error:
            failed[room] = str(error)
        print(f"{room} of {undisturbed.count}, {len(failed)} failed", flush=True)
        shutil.rmtree(out, ignore_errors=True)
    rows = [f"| `{name}` | {count} |" for name, count in sorted(tried.items())]
    good = sum(tried.values())
    head = ["| refused from a write of | times, each went on to the same numbers |", "|---|---:|"]
    table = "\n".join([*head, *rows, f"| all | {good} of {undisturbed.count} |"]) + "\n"
    found = {
        "writes": undisturbed.count,
        "good": good,
        "failed": failed,
        "seconds": round(time.monotonic() - begun),
        "versions": versions(),
        "machine": machine(),
    }
    asked.out.mkdir(parents=True, exist_ok=True)
    (asked.out / "full_disk.json").write_text(json.dumps(found, indent=1) + "\n")
    (asked.out / "full_disk.md").write_text(table)
    print(table, end="")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
