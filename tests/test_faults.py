"""A disk that refuses, a clock that leaps, lines that are missing: no number is lost and none is changed."""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cl_graft.experiment.cell import run
from cl_graft.store.record import states
from tests import faults, full_disk, kills
from tests.full_disk import Reference, config, told

SOME = 6  # of the writes of a run; `python -m tests.full_disk` tries every one

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Any:
    return kills.server()


@pytest.fixture(scope="module")
def scenario(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenario of the kills."""
    return kills.write_scenario(tmp_path_factory.mktemp("scenario"))


@pytest.fixture(scope="module")
def reference(server: Any, scenario: Path, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return full_disk.reference(server, scenario, tmp_path_factory.mktemp("reference"))


def writes(count: int) -> Iterator[int]:
    rng = random.Random(0)
    for part in range(SOME):
        yield rng.randrange(count * part // SOME, count * (part + 1) // SOME) + 1


def test_a_disk_that_is_full_from_any_write_on(
    server: Any, scenario: Path, reference: Reference, tmp_path: Path
) -> None:
    """One sentence; all that was finished stays as it is; with room again the run ends with the same numbers."""
    assert reference.count > 50
    for room in writes(reference.count):
        full_disk.refused(server, scenario, room, reference, tmp_path / str(room))


def test_a_folder_that_may_only_be_read(server: Any, scenario: Path, tmp_path: Path) -> None:
    made = config(scenario, tmp_path / "out")
    _, said, _ = told(server, faults.on_a_disk, [made], 1, errno.EROFS)
    assert "Read-only file system" in said and "choose another --out" in said
    assert "\n" not in said and said.endswith(".")


def test_a_clock_that_leaps(
    server: Any, scenario: Path, reference: Reference, tmp_path: Path
) -> None:
    made = config(scenario, tmp_path)
    assert told(server, faults.under_a_leaping_clock, [made]) == "done"
    assert kills.numbers(made.out / made.cell) == reference.numbers
    assert states(made.out)[made.out / made.cell]["state"] == "done"


@pytest.mark.parametrize("torn", ["a line less", "half a line less", "nothing"])
@pytest.mark.parametrize("kind", ["evaluations/*.jsonl", "pairs/*.jsonl", "stages/*/log.jsonl"])
def test_lines_that_are_missing_from_what_cells_share_are_made_again(
    scenario: Path, reference: Reference, kind: str, torn: str, tmp_path: Path
) -> None:
    """And never taken for the whole, wherever the file was cut."""
    shutil.copytree(reference.out / "cache", tmp_path / "cache")
    whole = {f: f.read_text() for f in (tmp_path / "cache").glob(kind)}
    assert whole
    for file, text in whole.items():
        lines = text.splitlines(keepends=True)
        half = lines[-1][: len(lines[-1]) // 2]
        kept = {"a line less": lines[:-1], "half a line less": [*lines[:-1], half], "nothing": []}
        file.write_text("".join(kept[torn]))
    again = config(scenario, tmp_path / "again").model_copy(update={"cache": tmp_path / "cache"})
    run(again)
    assert kills.numbers(again.out / again.cell) == reference.numbers
    if not kind.startswith("stages"):  # whose lines tell how long they took
        assert {f: len(f.read_text().splitlines()) for f in whole} == {
            f: len(text.splitlines()) for f, text in whole.items()
        }
    kills.assert_done(tmp_path)
