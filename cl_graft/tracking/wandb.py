"""A cell as one run in Weights & Biases, however often it is begun.

The run's id follows from the cell's name and identity, and every row of its history has a step that follows from the
experiences before it. An experience that an earlier attempt has logged is not logged again. Offline, its file tells:
W&B's process may die before it has written what it was given. Online, a marker beside it does, written after the fact;
the last experience there may not have left, and is sent again: W&B drops rows whose steps it has.

W&B works in threads that are waited for so long and no longer. One that does not answer is left behind, and the
process that W&B had started is killed; what it has written can be uploaded later, by `wandb sync`.
"""

from __future__ import annotations

import os
import queue
import re
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from cl_graft.config import RunConfig, WandbMode
from cl_graft.errors import CLGraftError
from cl_graft.store.digests import digest
from cl_graft.store.files import write_text
from cl_graft.store.locks import Busy
from cl_graft.store.record import CellFolder
from cl_graft.tracking import figures, matrices, of_experience, of_point, of_result

T = TypeVar("T")

CONFIG = ("options", "versions", "tasks", "base", "data", "budget_bytes", "base_bytes")
EXPERIENCE_SECONDS = 90.0  # to start, and to take an experience in; uploading goes on behind
FINISH_SECONDS = 600.0  # to upload what is left
INTERRUPTED_SECONDS = 5.0  # the same after Ctrl-C; an executor kills a worker that takes ten


def tracker(config: RunConfig, folder: Path, identity: dict[str, Any]) -> Wandb | None:
    mode = resolve(config.wandb)
    return None if mode == "off" else Wandb(config, folder, identity, mode)


def resolve(mode: WandbMode) -> str:
    """`auto` is online where somebody is logged in, offline elsewhere."""
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return "offline" if os.environ["WANDB_MODE"] == "offline" else "off"
    return "online" if os.environ.get("WANDB_API_KEY") or _in_netrc() else "offline"


def require_login(mode: WandbMode) -> None:
    """Raises CLGraftError where runs are to be online and nobody is logged in."""
    if mode == "online" and not (os.environ.get("WANDB_API_KEY") or _in_netrc()):
        raise CLGraftError(
            "nobody is logged in to Weights & Biases here; run `wandb login`, or leave out --wandb online."
        )


def _in_netrc() -> bool:
    with suppress(OSError, RuntimeError):  # it may be somebody else's, and there may be no home
        netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
        return str(host) in netrc.read_text(errors="ignore")
    return False


class Wandb:
    """Config, scores and packs as they come, then matrices, figures, metrics and costs."""

    name = "W&B"

    def __init__(self, config: RunConfig, folder: Path, identity: dict[str, Any], mode: str):
        self.config, self.cell, self.identity, self.mode = (
            config,
            CellFolder(folder),
            identity,
            mode,
        )
        self.folder = folder / "tracking"
        self.marker = self.folder / "sent.txt"
        self.run: Any = None
        self.others: set[Any] | None = None  # W&B's processes before we started; None: we have not
        self.step = 0  # of the next row

    @property
    def id(self) -> str:
        """The run's id, which an experiment has in every attempt."""
        about = {key: self.identity[key] for key in ("config", "options", "base", "data")}
        return digest(self.config.cell, about)

    @cached_property
    def sent(self) -> list[str]:
        """The digest of each experience that this run or an earlier attempt has sent."""
        return self.marker.read_text().split()[:-1] if self.marker.is_file() else []

    @cached_property
    def written(self) -> list[Path]:
        """Files of earlier attempts."""
        return list(self.folder.glob(f"wandb/offline-run-*-{self.id}/*.wandb"))

    def _logged(self, key: str) -> bool:
        if self.mode == "online":
            return key in self.sent
        return any(held(file, key) for file in self.written)

    def experience(self, record: dict[str, Any]) -> None:
        """Training curves, scores and costs, over `experience`, and the pack as an artifact."""
        rows: list[dict[str, Any]] = [of_point(point) for point in record["losses"]]
        rows.append(
            {
                "experience": record["experience"],
                **of_experience(record),
                "record": (key := digest(record)),
            }
        )
        first, self.step = self.step, self.step + len(rows)
        if self._logged(key):
            return
        self._bounded(EXPERIENCE_SECONDS, lambda: self._log(record, rows, first))
        self.sent.append(key)
        self._mark()

    def finish(self, result: dict[str, Any]) -> None:
        """Matrices as tables, the report's figures as images, metrics and costs as the summary."""
        drawn = figures(result)
        self._bounded(FINISH_SECONDS, lambda: self._finish(result, drawn))

    def abandon(self, error: BaseException) -> None:
        if self.others is None:
            return
        seconds = FINISH_SECONDS if isinstance(error, Exception) else INTERRUPTED_SECONDS
        self._bounded(seconds, lambda: self._close(int(not isinstance(error, Busy))))

    # --- in a thread ---

    def _log(self, record: dict[str, Any], rows: list[dict[str, Any]], first: int) -> None:
        run = self._started()
        if record["pack"]:
            run.log_artifact(self._artifact(record))
        for step, row in enumerate(
            rows, first
        ):  # the experience's own row last: it tells that all is there
            run.log(row, step=step, commit=True)

    def _finish(self, result: dict[str, Any], drawn: dict[str, Any]) -> None:
        run = self._started()
        import wandb

        columns = ["experience", *result["tasks"]]
        row = {k: wandb.Table(columns=columns, data=rows) for k, rows in matrices(result).items()}
        row |= {name: wandb.Image(image) for name, image in drawn.items()}
        run.log(row, step=self.step, commit=True)
        run.summary.update(summary := of_result(result))
        file = Path(run.settings.sync_file)
        self._close(0)
        if self.mode == "offline" and not self.others and not held(file, list(summary)[-1]):
            raise OSError(f"{file} is not whole; is the disk full?")

    def _started(self) -> Any:
        """The run, begun at the first thing to be logged: an attempt that logs nothing leaves no trace."""
        if self.run is not None:
            return self.run
        self.others = _cores()
        import wandb

        # W&B goes to the system's temporary folder by itself where it cannot write into ours
        self._mark()
        # create_new: a run that the caller has open is none of ours
        quiet = wandb.Settings(silent=True, console="off", reinit="create_new")
        if not self.others:
            wandb.setup(quiet)  # what it says of its own process, too, is said in our line
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "cl-graft",
            id=self.id,
            resume="allow",
            name=self.config.cell,
            group=f"{self.config.short(self.config.scenario)}/{self.config.model}"[:128],
            dir=str(self.folder),
            mode=self.mode,  # type: ignore[arg-type]
            config=self.config.model_dump(mode="json")
            | {f"resolved_{k}" if k == "options" else k: self.identity[k] for k in CONFIG},
            settings=quiet,
        )
        for stepped in (
            "score/*",
            "general/*",
            "kl_to_base/*",
            "seconds/*",
            "pack_bytes",
            "tokens",
        ):
            self.run.define_metric(stepped, step_metric="experience")
        return self.run

    def _artifact(self, record: dict[str, Any]) -> Any:
        """The pack, which stays where it is: neither staged nor cached, so that it is on disk once."""
        import wandb

        name = re.sub(r"[^A-Za-z0-9._-]+", "-", f"{self.config.cell}-{record['task']}")
        if len(name) > 128:
            name = f"{name[:119]}-{digest(name)[:8]}"
        artifact = wandb.Artifact(
            name=name,
            type="skillpack",
            metadata={
                "bytes": record["pack_bytes"],
                "base": self.identity["base"],
                "task": record["task"],
                "digest": record["pack"],
            },
        )
        path = self.cell.pack_path(record["experience"], record["task"])
        artifact.add_file(str(path.resolve()), policy="immutable", skip_cache=True)
        return artifact

    def _close(self, code: int) -> None:
        """End the run and W&B's process, which else outlives a worker: one ends as soon as its cell has."""
        run, self.run = self.run, None
        try:
            if run is not None:
                run.finish(exit_code=code)
        finally:
            self._teardown()

    def _teardown(self) -> None:
        """End W&B's process, even a dead one: the next cell needs a new one. A run of the caller's keeps its own."""
        import wandb

        if not self.others and wandb.run is None:
            wandb.teardown()

    # --- around it ---

    def _mark(self) -> None:
        write_text(self.marker, "".join(f"{key}\n" for key in self.sent))

    def _bounded(self, seconds: float, call: Callable[[], None]) -> None:
        try:
            bounded(seconds, call)
        except TimeoutError:
            self._kill()
            raise

    def _kill(self) -> None:
        for core in self._own_cores():
            with suppress(Exception):
                core.kill()
        self.run = None
        with suppress(Exception):
            bounded(INTERRUPTED_SECONDS, self._teardown)
        self.others = None

    def _own_cores(self) -> set[Any]:
        return _cores() - self.others if self.others is not None else set()


def _cores() -> set[Any]:
    """W&B's processes that this one has started."""
    import psutil

    processes = set()
    for process in psutil.Process().children():
        with suppress(psutil.Error):
            if process.name().startswith("wandb") and process.status() != psutil.STATUS_ZOMBIE:
                processes.add(process)
    return processes


def held(file: Path, word: str) -> bool:
    """Whether W&B's file holds a word: its process says nothing of records that it could not write.

    Blocks of 32 KiB begin with a header of seven bytes, which may stand in the middle of the word.
    """
    data, block = file.read_bytes(), 32 * 1024
    inside = b"".join(data[i + 7 : i + block] for i in range(0, len(data), block))
    return word.encode() in inside


def bounded(seconds: float, call: Callable[[], T]) -> T:
    """What it returns or raises. Raises TimeoutError after so many seconds, and leaves its thread behind."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((call(), None))
        except BaseException as error:  # W&B exits where its process has
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        value, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no answer in {seconds:g} seconds") from None
    if isinstance(error, Exception):
        raise error
    if error is not None:
        raise RuntimeError(f"{type(error).__name__}: {error}")
    return value
