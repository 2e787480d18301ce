"""What a cell leaves on disk. Files are written atomically, the file that marks completeness last.

<out>/<cell>/cell.json                     the experiment, its versions and fingerprints
<out>/<cell>/packs/01-<task>.safetensors   what the strategy stores for each task
<out>/<cell>/stages/01/examples.jsonl      every outcome: task, metric, index, score, answer
<out>/<cell>/stages/01/stage.json          scores, bytes and costs; its presence says the stage is whole
<out>/<cell>/result.json                   the matrix and all that a report needs; present when complete
<out>/<cell>/state.json                    waiting, running, done or failed, since when, and where
<out>/<cell>/traceback.txt                 of the last attempt, if it failed
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import shutil
import socket
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .errors import CLGraftError, Refused

if TYPE_CHECKING:
    from filelock import FileLock

FORMAT = 2
State = Literal["waiting", "running", "done", "failed"]
LEFT = (".tmp", ".part")  # ends of the names of what is being written, here or from a mirror
PATIENCE = (
    0.5  # seconds that a cell's lock is waited for: a sweep holds it while it marks what waits
)


class RecordError(CLGraftError):
    """A results folder cannot be read, written, or continued."""


class DiskRefused(RecordError, Refused):
    """The disk takes no file."""


class Busy(RecordError):
    """Another process is making it."""


class CellBusy(Busy):
    """Another process computes this cell."""


def write_text(path: Path, text: str) -> None:
    """Atomic: a sibling temporary file, flushed to disk, then renamed. Raises DiskRefused if the disk does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DiskRefused(
            f"{path} cannot be written ({error.strerror}); free space or choose another --out, "
            "then run the same command again to continue."
        ) from error
    finally:
        with suppress(OSError):  # there is none after a success, or where no file can be
            temporary.unlink()


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(
            f"{path} cannot be read ({error}); delete its cell's folder to compute it anew."
        ) from error


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSON-lines file; a torn last line, as a kill leaves, is passed over.

    Raises RecordError for a broken line elsewhere, with its number, and for a file that cannot be read.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(
            f"{path} cannot be read ({error.strerror}); delete its cell's folder to compute it anew."
        ) from error
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            yield json.loads(line)
        except ValueError as error:
            if number == len(lines):
                return
            raise RecordError(
                f"{path}, line {number} is not JSON ({error}); delete its cell's folder to compute it anew."
            ) from error


def write_lines(path: Path, about: Mapping[str, Any], lines: Iterable[Mapping[str, Any]]) -> None:
    """JSON lines under a first one, which says `about` and how many follow it."""
    texts = [json.dumps(line) for line in lines]
    first = json.dumps({**about, "lines": len(texts)})
    write_text(path, "".join(f"{text}\n" for text in (first, *texts)))


def read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """What `write_lines` wrote; None for a file that is not there, or not all there."""
    try:
        first, *lines = read_jsonl(path)
    except (RecordError, ValueError):
        return None
    return (first, lines) if first.get("lines") == len(lines) else None


def flush(folder: Path) -> None:
    """Push every file of a folder to the disk, before a marker says that it is whole."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


@contextmanager
def locked(path: Path, patient: bool = True) -> Iterator[None]:
    """Held while `path` is made: whoever comes second waits, and finds the work done.

    What a process that was killed meanwhile left half-made beside `path` is removed.
    Raises RecordError where the disk refuses even a lock, and Busy, if not patient, where it would have to wait.
    """
    from filelock import Timeout

    lock = file_lock(Path(f"{path}.lock"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=-1 if patient else 0)
    except Timeout:
        raise Busy(f"{path} is being made by another process; wait for it.") from None
    except OSError as error:
        raise refused(path, str(error.strerror)) from error
    try:
        for left in path.parent.glob(f".{glob.escape(path.name)}[.-]*"):
            if left.suffix in LEFT:
                shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def file_lock(path: Path) -> FileLock:
    """The system's own lock, which it releases when its holder dies; where it has none, taking it raises OSError."""
    from filelock import FileLock

    return FileLock(path, fallback_to_soft=False)


def use(path: Path, reader: object) -> None:
    """Tell that `path` is read for as long as `reader` lives; under its lock, so that it cannot vanish before."""
    with suppress(OSError):  # a disk without locks protects nothing
        descriptor = os.open(f"{path}.used", os.O_RDWR | os.O_CREAT, 0o666)
        weakref.finalize(reader, os.close, descriptor)
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)


def used(path: Path) -> bool:
    """Whether a process has told by `use` that it reads `path`."""
    return held(Path(f"{path}.used"), fcntl.LOCK_EX)


def held(path: Path, kind: int = fcntl.LOCK_SH) -> bool:
    """Whether a process holds the lock of this file now; kind: LOCK_EX asks for shared ones, too."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(descriptor)
    return False


def refused(path: Path, reason: str) -> DiskRefused:
    """What to raise where the disk does not take a file of the cache."""
    return DiskRefused(
        f"{path} cannot be written ({reason}); free space or choose another --out or --cache, "
        "then run the same command again to continue."
    )


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

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held while a process works on the cell; released by the system if the process dies."""
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
        found: dict[str, Any] = read_json(file) if file.is_file() else {"state": "waiting"}
        if self.complete:
            return found | {"state": "done"}
        dead = found["state"] == "running" and not held(self.lock_file)
        return found | {"state": "waiting"} if dead or found["state"] == "done" else found

    def failed(self, reason: str, trace: str) -> None:
        write_text(self.path / "traceback.txt", trace)
        self.mark("failed", reason=reason)

    def begin(self, identity: dict[str, Any]) -> None:
        """Write `cell.json`, or check that the one there tells the same experiment.

        Raises RecordError for a folder of another version or made from other data.
        """
        if not (self.path / "cell.json").exists():
            write_json(self.path / "cell.json", {"format": FORMAT, **identity})
        self.check({key: identity.get(key) for key in ("config", "options", "base", "data")})

    def identity(self) -> dict[str, Any]:
        """What `cell.json` says. Raises RecordError for a folder of another version."""
        found = read_json(self.path / "cell.json")
        version = found.get("format") if isinstance(found, dict) else None
        if version != FORMAT:
            raise RecordError(
                f"{self.path} was written in results format {version} and this version knows {FORMAT}; "
                "choose another --out, or the version that wrote it."
            )
        return found

    def check(self, part: dict[str, Any]) -> None:
        """Raises RecordError where `cell.json` differs from this part of an identity."""
        found = self.identity()
        for key, now in part.items():
            then = found.get(key)
            if then == now:
                continue
            if key == "config" and isinstance(then, dict):
                key = " and ".join(k for k in now if then.get(k) != now[k]) or key
            raise RecordError(
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

    def pack_path(self, stage: int, task: str) -> Path:
        return self.path / "packs" / f"{stage:02d}-{task}.safetensors"

    def new_pack_path(self, stage: int, task: str) -> Path:
        """`pack_path`, in a folder that is there now. Raises RecordError if the disk refuses it."""
        path = self.pack_path(stage, task)
        self._make(path.parent)
        return path

    def stage_path(self, stage: int) -> Path:
        return self.path / "stages" / f"{stage:02d}"

    def write_stage(self, stage: int, examples: Iterable[dict], record: dict[str, Any]) -> None:
        folder = self.stage_path(stage)
        # in ASCII, because what a program says of itself may hold halves of surrogate pairs
        lines = "".join(json.dumps(e) + "\n" for e in examples)
        write_text(folder / "examples.jsonl", lines)
        write_json(folder / "stage.json", record)

    def stages(self) -> list[dict[str, Any]]:
        """Records of the whole stages, from row 0 on, up to the first that is missing."""
        records: list[dict[str, Any]] = []
        while (file := self.stage_path(len(records)) / "stage.json").is_file():
            records.append(read_json(file))
        return records


def states(folder: Path) -> dict[Path, dict[str, Any]]:
    """{cell's folder: its state, with the number of its whole stages}. Raises RecordError where there is no cell."""
    found = {file.parent for file in folder.rglob("state.json")} if folder.is_dir() else set()
    if not found:
        raise RecordError(f"{folder} holds no cell; give the folder that --out named.")
    read = {path: CellFolder(path) for path in sorted(found)}
    return {path: cell.state() | {"stages": len(cell.stages())} for path, cell in read.items()}


def cells(folder: Path) -> list[Path]:
    """Cell folders at or below `folder`, sorted. Raises RecordError if there is none."""
    if not folder.is_dir():
        raise RecordError(f"there is no folder {folder}; give the folder that --out named.")
    found = sorted(file.parent for file in folder.rglob("cell.json"))
    if not found:
        raise RecordError(f"{folder} holds no cell; run `cl-graft run` with --out {folder} first.")
    return found
