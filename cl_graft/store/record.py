"""What a cell leaves on disk. Files are written atomically, the file that marks completeness last.

<out>/<cell>/cell.json                     the experiment, its versions and fingerprints
<out>/<cell>/packs/01-<task>.safetensors   what the strategy stores for each task
<out>/<cell>/packs/shared/01-<name>...     what its tasks share, as the last experience that changed it left it
<out>/<cell>/experiences/01/examples.jsonl   every outcome: task, metric, index, score, answer, what it was taken for
<out>/<cell>/experiences/01/experience.json  scores, bytes and costs; its presence says the experience is whole
<out>/<cell>/result.json                   the matrix and all that a report needs; present when complete
<out>/<cell>/state.json                    waiting, running, done or failed, since when, and where
<out>/<cell>/traceback.txt                 of the last attempt, if it failed
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

from cl_graft.errors import Refused
from cl_graft.store.files import LEFT, DiskRefused, RecordError, read_json, write_json, write_text
from cl_graft.store.locks import Busy, file_lock, held

FORMAT = 4
CHECKED = ("config", "options", "sources", "inputs", "base", "data", "engine")  # of an identity
State = Literal["waiting", "running", "done", "failed"]
PATIENCE = (
    0.5  # seconds that a cell's lock is waited for: a sweep holds it while it marks what waits
)


class CellBusy(Busy):
    """A cell that another process computes."""


class AnotherCell(RecordError, Refused):
    """A folder whose `cell.json` tells another experiment than the one that is to be put there."""


class CellFolder:
    """The folder of one cell."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def lock_file(self) -> Path:
        return self.path / ".lock"

    @property
    def complete(self) -> bool:
        return (self.path / "result.json").is_file()

    @property
    def begun(self) -> bool:
        return self.complete or (self.path / "cell.json").is_file()

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the cell while a process works on it; the system releases it if the process dies."""
        from filelock import Timeout

        self._make(self.path)
        lock = file_lock(self.lock_file)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            raise CellBusy(
                f"{self.path} is being computed by another process; wait for it or choose another --out."
            ) from None
        except OSError as error:
            raise DiskRefused(
                f"{self.path} cannot be locked ({error.strerror}); choose another --out."
            ) from error
        try:
            for left in self.path.rglob(".*"):  # by a process that was killed while it wrote
                if left.suffix in LEFT:
                    left.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def mark(self, state: State, **more: Any) -> None:
        """Persist the cell's state, under its lock. Raises RecordError if the disk refuses it."""
        where = {"since": time.time(), "host": socket.gethostname(), "pid": os.getpid()}
        write_json(self.path / "state.json", {"state": state, **where, **more})
        if state == "running":
            (self.path / "traceback.txt").unlink(missing_ok=True)

    def state(self) -> dict[str, Any]:
        """What `mark` wrote last, put right: a result says `done`, and what a killed process left is `waiting`.

        Whether one runs is told by its lock, wherever it runs: a pid may be of another machine, or another's by now.
        """
        file = self.path / "state.json"
        marked: Any = read_json(file) if file.is_file() else {"state": "waiting"}
        if not isinstance(marked, dict) or marked.get("state") not in get_args(State):
            raise RecordError(
                f"{file} names no state of a cell; delete the file, and run the same command again."
            )
        if self.complete:
            return marked | {"state": "done"}
        if marked["state"] in ("running", "done"):
            return marked | {"state": "running" if held(self.lock_file) else "waiting"}
        return marked

    def failed(self, reason: str, trace: str) -> None:
        write_text(self.path / "traceback.txt", trace)
        self.mark("failed", reason=reason)

    def begin(self, identity: dict[str, Any]) -> None:
        """Write `cell.json`, or check that the one there tells the same experiment.

        Raises RecordError for a folder of another version, AnotherCell for other data, weights or source files.
        """
        if not (self.path / "cell.json").exists():
            write_json(self.path / "cell.json", {"format": FORMAT, **identity})
        self.check({key: identity.get(key) for key in CHECKED})

    def identity(self) -> dict[str, Any]:
        """What `cell.json` says. Raises RecordError for a folder of another version."""
        about = read_json(self.path / "cell.json")
        version = about.get("format") if isinstance(about, dict) else None
        if version != FORMAT:
            raise RecordError(
                f"{self.path} was written in results format {version} and this version knows {FORMAT}; "
                "choose another --out, or the version that wrote it."
            )
        return about

    def check(self, part: dict[str, Any]) -> None:
        """Raises AnotherCell where `cell.json` differs from this part of an identity."""
        recorded = self.identity()
        for key, now in part.items():
            then = recorded.get(key)
            if then == now:
                continue
            if key in ("sources", "inputs"):
                raise AnotherCell(
                    f"{self.path} was made {_difference(then, now)}; choose another --out, or delete the folder "
                    "to compute it anew."
                )
            if key == "config" and isinstance(then, dict):
                key = " and ".join(k for k in now if then.get(k) != now[k]) or key
            raise AnotherCell(
                f"{self.path} was begun with another {key} than now; choose another --out "
                "or delete the folder."
            )

    def _make(self, path: Path) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskRefused(
                f"{path} cannot be made ({error.strerror}); choose another --out."
            ) from error

    def pack_path(self, experience: int, task: str) -> Path:
        return self.path / "packs" / f"{experience:02d}-{task}.safetensors"

    def new_pack_path(self, experience: int, task: str) -> Path:
        """`pack_path`, in a folder that is there now. Raises RecordError if the disk refuses it."""
        path = self.pack_path(experience, task)
        self._make(path.parent)
        return path

    def shared_path(self, experience: int, name: str) -> Path:
        """Where an artefact that tasks share is, as it was after an experience that changed it."""
        return self.path / "packs" / "shared" / f"{experience:02d}-{name}.safetensors"

    def new_shared_path(self, experience: int, name: str) -> Path:
        """`shared_path`, in a folder that is there now. Raises RecordError if the disk refuses it."""
        path = self.shared_path(experience, name)
        self._make(path.parent)
        return path

    def keep_shared(self, shared: Mapping[str, Any]) -> None:
        """Remove shared artefacts but these, {name: {"experience": ...}}: a later one has taken their place."""
        kept = {self.shared_path(told["experience"], name) for name, told in shared.items()}
        for file in (self.path / "packs" / "shared").glob("*.safetensors"):
            if file not in kept:
                file.unlink(missing_ok=True)

    def experience_path(self, experience: int) -> Path:
        return self.path / "experiences" / f"{experience:02d}"

    def write_experience(
        self, experience: int, examples: Iterable[dict], record: dict[str, Any]
    ) -> None:
        folder = self.experience_path(experience)
        # in ASCII, because what a program says of itself may hold halves of surrogate pairs
        lines = "".join(json.dumps(e) + "\n" for e in examples)
        write_text(folder / "examples.jsonl", lines)
        write_json(folder / "experience.json", record)

    def experiences(self) -> list[dict[str, Any]]:
        """Records of the whole experiences, from row 0 on, up to the first that is missing."""
        records: list[dict[str, Any]] = []
        while (file := self.experience_path(len(records)) / "experience.json").is_file():
            if not isinstance(record := read_json(file), dict):
                raise RecordError(
                    f"{file} is no record of an experience; delete its cell's folder to compute it anew."
                )
            records.append(record)
        return records


def _difference(then: Any, now: Any) -> str:
    """What differs between two nests of {file: digest}, in words."""
    before, after = dict(_leaves(then or {})), dict(_leaves(now or {}))
    changed = [leaf for leaf in before if leaf in after and before[leaf] != after[leaf]]
    told = {
        "with another {} than there is now": changed,
        "without {}, which is read now": [leaf for leaf in after if leaf not in before],
        "with {}, which is no longer read": [leaf for leaf in before if leaf not in after],
    }
    parts = [
        words.format(" and ".join(dict.fromkeys(leaf[-1] for leaf in leaves)))
        for words, leaves in told.items()
        if leaves
    ]
    return ", and ".join(parts)


def _leaves(nest: Any, way: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(nest, dict):
        for key, inner in nest.items():
            yield from _leaves(inner, (*way, key))
    else:
        yield way, nest


def states(folder: Path) -> dict[Path, dict[str, Any]]:
    """{cell's folder: its state, and how many experiences are whole}; `unreadable` where its files do not tell.

    Raises RecordError where there is no cell.
    """
    folders = {file.parent for file in folder.rglob("state.json")} if folder.is_dir() else set()
    if not folders:
        raise RecordError(f"{folder} holds no cell; give the folder that --out named.")
    return {path: _state(CellFolder(path)) for path in sorted(folders)}


def _state(cell: CellFolder) -> dict[str, Any]:
    try:
        return cell.state() | {"experiences": len(cell.experiences())}
    except RecordError as error:
        return {"state": "unreadable", "reason": str(error), "experiences": 0}


def cells(folder: Path) -> list[Path]:
    """Cell folders at or below `folder`, sorted. Raises RecordError if there is none."""
    if not folder.is_dir():
        raise RecordError(f"there is no folder {folder}; give the folder that --out named.")
    folders = sorted(file.parent for file in folder.rglob("cell.json"))
    if not folders:
        raise RecordError(f"{folder} holds no cell; run `cl-graft run` with --out {folder} first.")
    return folders
