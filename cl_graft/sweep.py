"""A grid of cells, each run by one of a few long-lived single-threaded workers.

Cells are independent. Each resumes at its last whole task, so a killed sweep is continued by running the
same command again, with the same numbers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import util
from typing import Any

from .config import RunConfig
from .errors import CLGraftError
from .record import write_text

Report = Callable[[str, str, float], None]  # cell, what is being done, fraction done


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish; its folder holds the traceback."""

    cell: str
    reason: str


def grid(
    scenarios: Sequence[str],
    strategies: Sequence[str],
    seeds: Sequence[int],
    models: Sequence[str],
    budgets: Sequence[str],
    **common: Any,
) -> list[RunConfig]:
    """Every combination, in the order given, seeds outermost so that early results compare all strategies."""
    product = itertools.product(seeds, scenarios, models, budgets, strategies)
    return [
        RunConfig(scenario=s, strategy=m, model=model, seed=seed, budget=budget, **common)
        for seed, s, model, budget, m in product
    ]


def default_workers() -> int:
    """One worker a core, and one a GPU where there are GPUs."""
    try:
        import torch

        gpus = torch.cuda.device_count()
    except ImportError:
        gpus = 0
    if hasattr(os, "sched_getaffinity"):
        return gpus or len(os.sched_getaffinity(0))
    return gpus or os.cpu_count() or 1


def sweep(cells: Sequence[RunConfig], workers: int, report: Report) -> list[Failure]:
    """Run or continue every cell that is not complete; returns those that failed.

    Everything that can be checked is checked before anything starts. Raises CLGraftError for a bad name or
    option; an interrupt stops the workers and loses at most the task under way in each.
    """
    from .cell import finished
    from .models import load
    from .prepare import prepare

    waiting = [c for c in cells if finished(c) is None]
    if not waiting:
        return []
    for config in waiting:
        prepare(config)
    for model, data_dir in sorted({(c.model, c.data_dir) for c in waiting}, key=str):
        report("models", f"preparing {model}", 0.0)
        load.locate(model, data_dir)
    context = multiprocessing.get_context("spawn")
    events = context.SimpleQueue()
    failures: list[Failure] = []
    pool = ProcessPoolExecutor(
        max(1, min(workers, len(waiting))), context, initializer=_start, initargs=(events,)
    )
    with pool:
        try:
            with _interrupts_held():
                pending = {pool.submit(_run_cell, config): config for config in waiting}
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                _drain(events, report)
                for future in done:
                    config = pending.pop(future)
                    failures += _outcome(future, config, report)
        except BaseException:
            _stop(pool)
            raise
    return failures


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back. Processes started meanwhile never see it: it is this one that stops them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _stop(pool: ProcessPoolExecutor) -> None:
    """End the workers. Each unwinds, so that nothing stays half-written; one that cannot is killed."""
    workers = list((getattr(pool, "_processes", None) or {}).values())
    for worker in workers:
        worker.terminate()
    deadline = time.monotonic() + 10
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
    pool.shutdown(wait=False, cancel_futures=True)


def _outcome(future: Any, config: RunConfig, report: Report) -> list[Failure]:
    try:
        reason = future.result()
    except BrokenProcessPool:
        reason = (
            "a worker process was killed; run the same command again to continue, "
            "with fewer --workers if memory was short"
        )
    if reason is None:
        report(config.cell, "done", 1.0)
        return []
    report(config.cell, "failed", 1.0)
    return [Failure(config.cell, reason)]


def _drain(events: Any, report: Report) -> None:
    while not events.empty():
        report(*events.get())


_events: Any = None  # in a worker: the queue of progress to the process that started it


def _start(events: Any) -> None:
    global _events
    _events = events
    threading.Thread(target=_end_with, args=[os.getpid()], daemon=True).start()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def _end_with(worker: int) -> None:
    """A worker does not outlive the process that started it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(worker, signal.SIGTERM)
        time.sleep(10)
        os._exit(1)


def _run_cell(config: RunConfig) -> str | None:
    """In a worker: None if the cell is complete, else why not. SIGTERM ends the worker, tidily."""
    last = [0.0]

    def progress(what: str, done: float) -> None:
        if time.monotonic() - last[0] > 0.2:
            last[0] = time.monotonic()
            _events.put((config.cell, what, done))

    signal.signal(signal.SIGTERM, _unwind)
    try:
        return _attempt(config, progress)
    except KeyboardInterrupt:
        util._exit_function()  # type: ignore[attr-defined]  # as at the end of any process
        os._exit(1)  # to return would begin the next cell
    finally:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def _unwind(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would cut the tidying short
    raise KeyboardInterrupt


def _attempt(config: RunConfig, progress: Callable[[str, float], None]) -> str | None:
    """None if the cell is complete, else why not; the traceback stays with the cell."""
    from .cell import run

    trace = config.out / config.cell / "traceback.txt"
    try:
        run(config, progress)
        trace.unlink(missing_ok=True)
        return None
    except CLGraftError as error:
        reason, text = str(error), traceback.format_exc()
    except Exception as error:
        reason, text = f"{type(error).__name__}: {error}", traceback.format_exc()
    try:
        write_text(trace, text)
    except CLGraftError as error:
        reason += f" ({error})"
    return reason


def options_from(sets: Sequence[tuple[str, str, Any]]) -> Mapping[str, dict[str, Any]]:
    """`--set` triples as {owner: {option: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for owner, option, value in sets:
        found.setdefault(owner, {})[option] = value
    return found
