"""One attempt at a cell, in whatever process an executor gives it."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ..config import RunConfig
from ..errors import CLGraftError
from ..record import Busy, CellBusy, CellFolder
from . import Outcome, Progress


def attempt(config: RunConfig, progress: Progress, patient: bool) -> Outcome:
    """Run the cell or continue it; its folder says meanwhile that it runs, and afterwards how it ended.

    patient: wait for what another process is making; else the outcome is `busy`.
    """
    from ..cell import run

    folder = CellFolder(config.out / config.cell)
    try:
        while True:
            try:
                run(config, progress, patient)
                return Outcome("done")
            except CellBusy:
                if not patient:
                    raise
                progress("waiting for another sweep", 0.0)
                time.sleep(1.0)
    except Busy as error:
        return Outcome("busy", str(error))
    except CLGraftError as error:
        reason, trace = str(error), traceback.format_exc()
    except Exception as error:
        reason, trace = f"{type(error).__name__}: {error}", traceback.format_exc()
    try:
        with suppress(CellBusy), folder.lock():  # else another sweep tries again already
            folder.failed(reason, trace)
    except CLGraftError as error:
        reason += f" ({error})"
    return Outcome("failed", reason)


def seldom(report: Callable[..., None], seconds: float = 0.2) -> Callable[..., None]:
    """The same report, not more often than that; a change of the words is always told."""
    last: list[Any] = [0.0, None]

    def told(what: str, done: float) -> None:
        if what != last[1] or time.monotonic() - last[0] > seconds:
            last[:] = time.monotonic(), what
            report(what, done)

    return told
