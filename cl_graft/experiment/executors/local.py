"""Processes of this machine, one for each attempt at a cell, a few at a time.

They are forked from one that has imported everything, so that a cell begins at once and a process that was killed
costs nothing but its own work. Where there are GPUs each is a new process with a GPU of its own: what has
spoken to CUDA cannot be forked.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import connection, util
from typing import TYPE_CHECKING, Any

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.experiment.attempt import attempt, seldom
from cl_graft.experiment.executors import WAITS, Executor, Outcome, Report, Work
from cl_graft.experiment.queue import Queue
from cl_graft.processes import cores, end_with_parent, forked_from, interrupts_held

if TYPE_CHECKING:
    from cl_graft.sweep_config import Sweep

DRIVERS = ("/proc/driver/nvidia", "/dev/kfd", "/dev/dxg")  # NVIDIA's, AMD's, and that of WSL


def gpus() -> int:
    """The number of GPUs that this process may use; without importing torch where no driver is there."""
    if sys.platform == "linux" and not any(map(os.path.exists, DRIVERS)):
        return 0
    import torch

    return torch.cuda.device_count()


def default_workers(threads: int) -> int:
    """The number of workers: one a GPU where there are GPUs, else as many as the cores suffice for."""
    return gpus() or max(1, cores() // threads)


def executor(asked: Sweep, cells: Sequence[RunConfig]) -> Executor:
    """Processes of this machine: as many at a time as the sweep says, else one a GPU, or as the cores suffice for."""
    # a stage of several processes has all of the machine's devices to itself
    several = any(c.launch.processes for c in cells)
    workers = asked.workers or (1 if several else default_workers(asked.threads))
    return partial(run_cells, workers=workers)


def apart(task: Callable[[Report], None], report: Report) -> None:
    """Do something in a process of its own, which has everything imported; what it reports is reported here.

    Raises CLGraftError with the sentence of the one that was raised there.
    """
    context = _context()
    hears, says = context.Pipe(duplex=False)
    process = context.Process(target=_aside, args=(says, task))
    try:
        with interrupts_held():
            process.start()
        says.close()
        while True:
            said = hears.recv()
            if isinstance(said, str):
                raise CLGraftError(said)
            report(*said)
    except EOFError:
        process.join()
        if process.exitcode:
            raise CLGraftError(
                "the process that prepares the sweep ended early; run the same command again."
            ) from None
    finally:
        _stop([process])


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    config: RunConfig


def run_cells(
    cells: Sequence[RunConfig], report: Report, workers: int, work: Work = attempt
) -> Iterator[tuple[RunConfig, Outcome]]:
    """Outcomes as they come. Whoever stops listening stops the workers; what they had finished stays."""
    left, context = Queue(cells), _context()
    slots: list[_Worker | None] = [None] * max(1, min(workers, len(cells)))
    try:
        while True:
            for i, worker in enumerate(slots):
                if worker is None and (chosen := left.next()):
                    slots[i] = _begin(context, work, *chosen, slot=i)
            running = [w for w in slots if w]
            if not running:
                return
            ready = connection.wait([w.pipe for w in running], timeout=1.0)
            for i, worker in enumerate(slots):
                if worker and worker.pipe in ready:
                    outcome = _heard(worker, report)
                    if outcome is None:
                        continue
                    slots[i] = None
                    if final := left.after(worker.config, outcome):
                        yield worker.config, final
                    else:
                        report(worker.config.cell, WAITS[outcome.state], 0.0)
    finally:
        _stop([w.process for w in slots if w])


def _context() -> Any:
    return (
        multiprocessing.get_context("spawn")
        if gpus()
        else forked_from("cl_graft.experiment.preload")
    )


def _begin(context: Any, work: Work, config: RunConfig, patient: bool, slot: int) -> _Worker:
    hears, says = context.Pipe(duplex=False)
    visible = None if config.launch.processes else _gpu_of(slot)  # a job of several takes them all
    process = context.Process(target=_work, args=(says, work, config, patient, visible))
    try:
        with interrupts_held():
            process.start()
    except BaseException:  # an interrupt that was held back
        _stop([process])
        raise
    says.close()
    return _Worker(process, hears, config)


def _gpu_of(slot: int) -> str | None:
    """One of the GPUs that this process may see, as CUDA_VISIBLE_DEVICES names it."""
    if not (count := gpus()):
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return visible.split(",")[slot % count]


def _heard(worker: _Worker, report: Report) -> Outcome | None:
    """Pass its progress on; what became of it, when it says so or is dead."""
    while True:
        try:
            said = worker.pipe.recv() if worker.pipe.poll() else None
        except (EOFError, OSError):
            worker.process.join()
            return Outcome(
                "lost",
                "its process was killed; with fewer --workers there is more memory for each",
            )
        if said is None:
            return None
        if isinstance(said, Outcome):
            _stop([worker.process], ask=False)
            return said
        report(worker.config.cell, *said)


def _stop(workers: Sequence[Any], ask: bool = True) -> None:
    """End the workers. Each unwinds, so that nothing stays half-written; one that cannot is killed.

    ask: they do not know yet that they are to end. Those that were never begun are passed over.
    """
    workers = [worker for worker in workers if worker.pid]
    for worker in workers if ask else ():
        worker.terminate()
    deadline = time.monotonic() + 10
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()


# --- in a worker ---


def _aside(says: connection.Connection, task: Callable[[Report], None]) -> None:
    with _worker():
        try:
            task(lambda *said: _tell(says, said))
        except CLGraftError as error:
            says.send(str(error))
        except Exception as error:  # a scenario's own, most likely
            traceback.print_exc()
            says.send(f"{type(error).__name__}: {error}")


def _work(
    says: connection.Connection,
    work: Work,
    config: RunConfig,
    patient: bool,
    visible: str | None,
) -> None:
    os.environ["OMP_NUM_THREADS"] = str(config.threads)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible

    with _worker():
        says.send(work(config, seldom(lambda *said: _tell(says, said)), patient))


def _tell(says: connection.Connection, said: tuple[Any, ...]) -> None:
    try:
        says.send(said)
    except OSError:  # nobody listens any more: no failure of the work
        raise KeyboardInterrupt from None


@contextmanager
def _worker() -> Iterator[None]:
    """Ends tidily when it is told to, and with the process that started it."""
    signal.signal(signal.SIGTERM, _unwind)
    signal.signal(signal.SIGALRM, _unwind)
    sys.unraisablehook = _unwind_again
    end_with_parent()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        yield
        # it is done: being told to end would cut the tidying short
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    except KeyboardInterrupt:
        util._exit_function()  # type: ignore[attr-defined]  # as at the end of any process
        os._exit(1)


def _unwind(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the tidying short
    raise KeyboardInterrupt


def _unwind_again(lost: Any) -> None:
    """Python drops what is raised within a `__del__`; where that was the interrupt, it comes again soon after."""
    if lost.exc_type is KeyboardInterrupt:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
    else:
        sys.__unraisablehook__(lost)
