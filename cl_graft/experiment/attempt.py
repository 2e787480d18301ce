"""One attempt at a cell, in whatever process an executor gives it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from typing import Any

from cl_graft.config import RunConfig
from cl_graft.errors import CLGraftError, Refused
from cl_graft.experiment.executors import CellProgress, Outcome
from cl_graft.plugins.authors import reason
from cl_graft.store.locks import Busy, held
from cl_graft.store.record import CellBusy, CellFolder


def attempt(config: RunConfig, progress: CellProgress, patient: bool) -> Outcome:
    """Run the cell or continue it; its folder says meanwhile that it runs.

    patient: wait for what another process is making; else the outcome is `busy`.
    """
    from cl_graft.experiment.cell import run

    try:
        while True:
            try:
                run(config, progress, patient)
                return Outcome("done")
            except CellBusy:
                if not patient:
                    raise
                progress("waiting for another sweep", 0.0)
                while held(CellFolder(config.out / config.cell).lock_file):
                    time.sleep(1.0)
    except Busy as error:
        return Outcome("busy", str(error))
    except Refused as error:
        return Outcome("refused", str(error))
    except CLGraftError as error:
        return Outcome("failed", str(error), traceback.format_exc())
    except (Exception, SystemExit) as error:
        return Outcome("failed", reason(error), traceback.format_exc())


def seldom(report: Callable[..., None], seconds: float = 0.2) -> Callable[..., None]:
    """A `report` that passes on one call in so many seconds; a change of the words is always told."""
    last: list[Any] = [0.0, None]

    def told(what: str, done: float, at: str = "") -> None:
        if what != last[1] or time.monotonic() - last[0] > seconds:
            last[:] = time.monotonic(), what
            report(what, done, at)

    return told
