"""A grid of cells, each run by one of a few long-lived single-threaded workers.

Cells are independent. Each resumes at its last whole task, so a killed sweep is continued by running the
same command again, with the same numbers.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

from .config import RunConfig
from .errors import CLGraftError
from .record import CellFolder, write_text

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
    return (
        gpus or len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )


def sweep(cells: Sequence[RunConfig], workers: int, report: Report) -> list[Failure]:
    """Run or continue every cell that is not complete; returns those that failed.

    Everything that can be checked is checked before anything starts. Raises CLGraftError for a bad name or
    option; an interrupt stops the workers and loses at most the task under way in each.
    """
    from .cell import prepare
    from .models import load

    waiting = [c for c in cells if not CellFolder(c.out / c.cell).complete]
    for config in waiting:
        prepare(config)
    for model, data_dir in sorted({(c.model, c.data_dir) for c in waiting}, key=str):
        report("models", f"preparing {model}", 0.0)
        load.locate(model, data_dir)
    context = multiprocessing.get_context("spawn")
    failures: list[Failure] = []
    with context.Manager() as manager:
        events = manager.Queue()
        pool = ProcessPoolExecutor(
            max(1, min(workers, len(waiting))), mp_context=context, initializer=_start
        )
        try:
            pending = {pool.submit(_run_cell, config, events): config for config in waiting}
            while pending:
                done, _ = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                _drain(events, report)
                for future in done:
                    config = pending.pop(future)
                    failures += _outcome(future, config, report)
        except BaseException:
            for process in list(getattr(pool, "_processes", {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        pool.shutdown()
    return failures


def _outcome(future: Any, config: RunConfig, report: Report) -> list[Failure]:
    try:
        reason = future.result()
    except BrokenProcessPool:
        reason = "a worker process was killed; run the same command again to continue"
    if reason is None:
        report(config.cell, "done", 1.0)
        return []
    report(config.cell, "failed", 1.0)
    return [Failure(config.cell, reason)]


def _drain(events: Any, report: Report) -> None:
    while not events.empty():
        report(*events.get())


def _start() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _run_cell(config: RunConfig, events: Any) -> str | None:
    """In a worker: None if the cell is complete, else why not. The traceback stays with the cell."""
    from .cell import run

    last = [0.0]

    def progress(what: str, done: float) -> None:
        if time.monotonic() - last[0] > 0.2:
            last[0] = time.monotonic()
            events.put((config.cell, what, done))

    try:
        run(config, progress)
        return None
    except CLGraftError as error:
        reason = str(error)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    try:
        write_text(config.out / config.cell / "traceback.txt", traceback.format_exc())
    except CLGraftError as error:
        reason += f" ({error})"
    return reason


def options_from(sets: Sequence[tuple[str, str, Any]]) -> Mapping[str, dict[str, Any]]:
    """`--set` triples as {owner: {option: value}}."""
    found: dict[str, dict[str, Any]] = {}
    for owner, option, value in sets:
        found.setdefault(owner, {})[option] = value
    return found
