"""A grid of cells, handed to an executor (executors/) that runs a few at a time.

Cells are independent. Each resumes at its last whole task, so a killed sweep is continued by running the
same command again, with the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError
from cl_graft.experiment.attempt import seldom
from cl_graft.experiment.executors import Executor, Outcome, Report
from cl_graft.store import prompts
from cl_graft.store.files import DiskRefused
from cl_graft.store.mirror import mirror_of
from cl_graft.store.record import CellBusy, CellFolder

Apart = Callable[[Callable[[Report], None], Report], None]  # calls the first with the second


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish; its folder holds the traceback, if it has one."""

    cell: str
    reason: str


def sweep(
    cells: Sequence[RunConfig],
    executor: Executor,
    report: Report,
    apart: Apart = lambda task, report: task(report),  # noqa: E731
    retry_failed: bool = False,
    fail_fast: bool = False,
) -> list[Failure]:
    """Run or continue every cell that is not complete; returns those that failed, now or before.

    Everything that can be checked is checked before anything starts. Raises CLGraftError for a bad name or
    option; an interrupt stops the workers and loses at most the task under way in each.
    apart: how the checks are called, in another process if need be. retry_failed: run those that failed before, too.
    fail_fast: stop at the first that fails.
    """
    from cl_graft.experiment.cell import finished
    from cl_graft.experiment.prepare import check_data

    waiting = [c for c in cells if finished(c) is None]
    if not waiting:
        return []
    check_data(waiting)  # without waiting for the libraries that the rest needs
    apart(partial(_prepared, waiting), report)
    failures = [] if retry_failed else [f for c in waiting if (f := _failed_before(c))]
    given_up = {f.cell for f in failures}
    waiting = [c for c in waiting if c.cell not in given_up]
    for failure in failures:
        report(failure.cell, "failed", 1.0)
    for config in waiting:
        folder = CellFolder(config.out / config.cell)
        with suppress(CellBusy), folder.lock():  # else another sweep computes it, and has said so
            folder.mark("waiting")
    left = {config.cell for config in waiting}
    for config, outcome in executor(waiting, report) if waiting else ():
        left.remove(config.cell)
        failed = _settled(config, outcome)
        report(config.cell, "failed" if failed else "done", 1.0)
        if failed:
            failures.append(failed)
            if fail_fast:
                return failures
    return failures + [
        Failure(cell, "it was not run; run the same command again.") for cell in left
    ]


def _settled(config: RunConfig, outcome: Outcome) -> Failure | None:
    """Bring a cell's outcome to this disk, and its failure if it is one."""
    from cl_graft.experiment.cell import finished

    folder = CellFolder(config.out / config.cell)
    if outcome.state == "done":
        try:
            if mirror := mirror_of(config):  # it may have been computed on another machine's disk
                mirror.pull(config.cell, folder.path)
                mirror.pull(prompts.FOLDER, config.out / prompts.FOLDER)
        except CLGraftError as error:
            return Failure(config.cell, str(error))
        if finished(config) is None:
            return Failure(config.cell, f"{folder.path} holds no result; is it a shared folder?")
        return None
    if outcome.state != "refused":  # else the same command tries it again
        with suppress(CellBusy, DiskRefused), folder.lock():
            folder.failed(outcome.reason, outcome.trace or outcome.reason)
    return Failure(config.cell, outcome.reason)


def _prepared(cells: Sequence[RunConfig], report: Report) -> None:
    """Check every name and option, and train every embedded model."""
    from cl_graft.experiment.cell import preparing
    from cl_graft.experiment.prepare import check
    from cl_graft.models import load

    check(cells)
    for model, data_dir in sorted({(c.model, c.data_dir) for c in cells}, key=str):
        report("models", f"preparing {model}", 0.0)
        load.locate(model, data_dir, preparing(model, seldom(partial(report, "models"))))


def _failed_before(config: RunConfig) -> Failure | None:
    state = CellFolder(config.out / config.cell).state()
    return Failure(config.cell, state["reason"]) if state["state"] == "failed" else None
