"""Other processes of this machine: how many there is room for, and how they are begun."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any


def cores() -> int:
    """How many this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def forked_from(preload: str) -> Any:
    """Context of processes that are forked from one that has imported the module `preload`, where the system can.

    A process has one such server: whoever begins it first says what it has imported.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    return context
