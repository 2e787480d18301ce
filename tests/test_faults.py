"""A disk that refuses, a clock that leaps, lines that are missing: no number is lost and none is changed."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_graft.config import Launch, RunConfig
from cl_graft.experiment.cell import run
from cl_graft.store.record import states
from tests import faults, kills

SOME = 6  # of the writes of a run, in CI; CL_GRAFT_FAULTS=all tries every one

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Any:
    return kills.server()


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenario of the kills."""
    return kills.write_scenario(tmp_path_factory.mktemp("scenario"))


def config(scenario: Path, out: Path) -> RunConfig:
    """A task of two steps, and two of preferences, each with a checkpoint."""
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


@pytest.fixture(scope="module")
def reference(server: Any, scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The numbers of an undisturbed cell, how often it asks the disk for something, and its folder."""
    made = config(scenario, tmp_path_factory.mktemp("reference"))
    count, said = told(server, faults.on_a_disk, [made], 10**9, errno.ENOSPC)
    assert said == ""
    return kills.numbers(made.out / made.cell), count, made.out


def finished(out: Path) -> dict[Path, bytes]:
    """What no continued run may write again: stages of the cell, and of the cache."""
    markers = [*out.rglob("stage.json"), *out.rglob("experience.json")]
    return {f: f.read_bytes() for m in markers for f in m.parent.iterdir() if f.is_file()}


def writes(count: int) -> Iterator[int]:
    if os.environ.get("CL_GRAFT_FAULTS") == "all":
        yield from range(1, count + 1)
        return
    rng = random.Random(0)
    for part in range(SOME):
        yield rng.randrange(count * part // SOME, count * (part + 1) // SOME) + 1


@pytest.mark.timeout(7200)
def test_a_disk_that_is_full_from_any_write_on(
    server: Any, scenario: Path, reference: Any, tmp_path: Path
) -> None:
    """One sentence; all that was finished stays as it is; with room again the run ends with the same numbers."""
    numbers, count, _ = reference
    assert count > 50
    for room in writes(count):
        made = config(scenario, tmp_path / str(room))
        _, said = told(server, faults.on_a_disk, [made], room, errno.ENOSPC)
        assert "No space left" in said or "disk is full" in said, (room, said)
        assert "\n" not in said and said.endswith("."), (room, said)
        kills.assert_whole(made.out)
        before = finished(made.out)
        assert told(server, faults.on_a_disk, [made], 10**9, errno.ENOSPC)[1] == "", room
        assert finished(made.out).items() >= before.items(), room
        kills.assert_done(made.out)
        assert kills.numbers(made.out / made.cell) == numbers, room


def test_a_folder_that_may_only_be_read(server: Any, scenario: Path, tmp_path: Path) -> None:
    made = config(scenario, tmp_path / "out")
    _, said = told(server, faults.on_a_disk, [made], 1, errno.EROFS)
    assert "Read-only file system" in said and "choose another --out" in said
    assert "\n" not in said and said.endswith(".")


def test_a_clock_that_leaps(server: Any, scenario: Path, reference: Any, tmp_path: Path) -> None:
    made = config(scenario, tmp_path)
    assert told(server, faults.under_a_leaping_clock, [made]) == "done"
    assert kills.numbers(made.out / made.cell) == reference[0]
    assert states(made.out)[made.out / made.cell]["state"] == "done"


@pytest.mark.parametrize("torn", ["a line less", "half a line less", "nothing"])
@pytest.mark.parametrize("kind", ["evaluations/*.jsonl", "pairs/*.jsonl", "stages/*/log.jsonl"])
def test_lines_that_are_missing_from_what_cells_share_are_made_again(
    scenario: Path, reference: Any, kind: str, torn: str, tmp_path: Path
) -> None:
    """And never taken for the whole, wherever the file was cut."""
    shutil.copytree(reference[2] / "cache", tmp_path / "cache")
    whole = {f: f.read_text() for f in (tmp_path / "cache").glob(kind)}
    assert whole
    for file, text in whole.items():
        lines = text.splitlines(keepends=True)
        half = lines[-1][: len(lines[-1]) // 2]
        kept = {"a line less": lines[:-1], "half a line less": [*lines[:-1], half], "nothing": []}
        file.write_text("".join(kept[torn]))
    again = config(scenario, tmp_path / "again").model_copy(update={"cache": tmp_path / "cache"})
    run(again)
    assert kills.numbers(again.out / again.cell) == reference[0]
    if not kind.startswith("stages"):  # whose lines tell how long they took
        assert {f: len(f.read_text().splitlines()) for f in whole} == {
            f: len(text.splitlines()) for f, text in whole.items()
        }
    kills.assert_done(tmp_path)
