"""What a cache folder holds: stages, pairs, answers, evaluations, divergences; and removing what is of no more use."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from cl_graft.store.digests import versions
from cl_graft.store.files import RecordError, read_json, read_lines
from cl_graft.store.locks import file_lock, used

TORN = "not all there"
NOT_WHOLE = (RecordError, KeyError, TypeError, AttributeError)  # of what a marker lacks


@dataclass(frozen=True)
class Entry:
    """One outcome in a cache.

    kind: stage, unfinished (step checkpoints of one that was stopped), pairs, answers, evaluation, or divergence.
    about: what it is of. age: seconds since it was written. current: this version of the code and its libraries can
    still recall it.
    """

    path: Path
    kind: str
    about: str
    bytes: int
    age: float
    current: bool


def entries(cache: Path) -> list[Entry]:
    """Everything in the folder, the largest first. Raises RecordError if it is no cache."""
    known = list(_entries(cache))
    if not known and not any((cache / name).is_dir() for name in ("stages", "evaluations")):
        raise RecordError(
            f"{cache} holds no stages and no evaluations; give a results folder, or the one that --cache named."
        )
    return sorted(known, key=lambda entry: -entry.bytes)


def _entries(cache: Path) -> Iterator[Entry]:
    from cl_graft.evaluation.divergence import divergence_code
    from cl_graft.evaluation.outcomes import evaluation_code, scorers_are_as_then
    from cl_graft.training.stages import MARKER, training_code

    for folder in (cache / "stages").glob("*"):
        if not folder.is_dir():
            continue
        if folder.suffix == ".work":
            yield _entry(folder, "unfinished", "step checkpoints", True)
        elif folder.name.endswith(".tmp"):
            yield _entry(folder, "unfinished", "being written, or removed", True)
        elif (folder / MARKER).is_file():
            try:
                made = read_json(folder / MARKER)
                job, current = made["config"], _current(made["made_by"], training_code())
                about = f"{job['kind']}, {job['steps']} steps of {job['batch']}, seed {job['seed']}"
            except NOT_WHOLE:
                about, current = TORN, False
            yield _entry(folder, "stage", about, current)
    for kind in ("pairs", "answers"):
        for file in (cache / kind).glob("*.jsonl"):
            made_of = read_lines(file)
            about = f"{len(made_of[1])} {kind}" if made_of else TORN
            yield _entry(file, kind, about, bool(made_of))
    for file in (cache / "evaluations").glob("*.jsonl"):
        if (evaluations := read_lines(file)) is None:
            yield _entry(file, "evaluation", TORN, False)
            continue
        first, _ = evaluations
        try:
            about = f"{first['task']} of {first['cell'] or 'no cell'}"
            current = _current(first["made_by"], evaluation_code())
            current = current and scorers_are_as_then(first["scorers"])
        except NOT_WHOLE:
            about, current = TORN, False
        yield _entry(file, "evaluation", about, current)
    for file in (cache / "divergences").glob("*.jsonl"):
        try:
            first, _ = read_lines(file) or ({}, [])
            about = f"{first['task']} of {first['cell'] or 'no cell'}"
            current = _current(first["made_by"], divergence_code())
        except NOT_WHOLE:
            about, current = TORN, False
        yield _entry(file, "divergence", about, current)


def _current(made_by: dict[str, Any], code: str) -> bool:
    return made_by == {"code": code, **versions()}


def _entry(path: Path, kind: str, about: str, current: bool) -> Entry:
    files = [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]
    written = max((f.stat().st_mtime for f in files), default=path.stat().st_mtime)
    size = sum(f.stat().st_size for f in files)
    return Entry(path, kind, about, size, max(0.0, time.time() - written), current)


def prune(cache: Path, everything: bool = False, older: float | None = None) -> list[Entry]:
    """Remove what no run can recall any more; or all that is `older` than so many seconds; or everything.

    What a process is working on stays. Returns what was removed. Nothing that a report reads is in a cache.
    """
    removed = []
    for entry in entries(cache):
        old = older is not None and entry.age > older
        if not (everything or old or not entry.current):
            continue
        with _free(entry.path) as free:
            if free:
                _remove(entry.path)
                removed.append(entry)
    return removed


def _remove(path: Path) -> None:
    """Out of sight at once, so that no half of a folder is ever taken for the whole."""
    if not path.is_dir():
        return path.unlink()
    gone = path.with_name(f".{path.name.removeprefix('.')}.gone.tmp")
    os.replace(path, gone)
    shutil.rmtree(gone)


@contextmanager
def _free(path: Path) -> Iterator[bool]:
    """Whether no process makes or reads this outcome; its lock is held meanwhile, and removed afterwards."""
    name = path.name.removeprefix(".").split(".")[0].split("-")[0] if path.is_dir() else path.name
    made = path.with_name(name)
    lock = file_lock(Path(f"{made}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        if used(made):
            yield False
            return
        yield True
        Path(f"{made}.used").unlink(missing_ok=True)
        Path(lock.lock_file).unlink(missing_ok=True)
    finally:
        lock.release()
