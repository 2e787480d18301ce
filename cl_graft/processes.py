"""Other processes of this machine: how many there is room for, how they are begun, and when they end."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any


def cores() -> int:
    """The number of cores that this process may use."""
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


@contextmanager
def modules_kept() -> Iterator[None]:
    """Import what stays until the end of a process of our own, and look for no garbage among it, then or later.

    Looking for it meanwhile is a fifth of the time that large libraries take.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back until the end. Processes started meanwhile never hear it: it is this one that stops them.

    Nor do they run the user's script again, as Python would have them do: it may begin with what started them.
    """
    with _script_left_out():
        yield from _held()


@contextmanager
def _script_left_out() -> Iterator[None]:
    main = sys.modules["__main__"]
    before = {name: main.__dict__.get(name, ...) for name in ("__file__", "__spec__")}
    main.__dict__.pop("__file__", None)
    main.__spec__ = None
    try:
        yield
    finally:
        main.__dict__.update({name: value for name, value in before.items() if value is not ...})


def _held() -> Iterator[None]:
    resource_tracker.ensure_running()  # which lets interrupts through again when it begins
    heard: list[int] = []
    before = None
    if threading.current_thread() is threading.main_thread():
        # what the main thread does not take, any other does, and it is raised in the main thread all the same
        before = signal.signal(signal.SIGINT, lambda number, _: heard.append(number))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        if before is not None:
            signal.signal(signal.SIGINT, before)
        if heard:
            signal.raise_signal(signal.SIGINT)


def signal_name(number: int) -> str:
    """SIGKILL for 9; Python has no names for most real-time signals."""
    names = {known.value: known.name for known in signal.Signals}
    return names.get(number, f"signal {number}")


def end_with_parent() -> None:
    """End this process when the one that started it has ended: it is told to, and is gone within ten seconds."""

    def wait(parent: Any) -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=wait, args=[parent], daemon=True).start()
