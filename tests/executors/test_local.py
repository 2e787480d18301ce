"""Processes of this machine: who stops listening ends them, and what they say is not taken for their death."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cl_graft.config import RunConfig
from cl_graft.experiment.executors import Outcome, local


def config(out: Path) -> RunConfig:
    return RunConfig(scenario="mini", strategy="individual", model="nano-llama", out=out)


def talks(config: RunConfig, progress: Any, patient: bool) -> Outcome:
    progress("begun", 0.0)
    time.sleep(60)
    return Outcome("done")


def sleeps(report: Any) -> None:
    time.sleep(60)


@contextmanager
def interrupted() -> Iterator[None]:
    """Ctrl-C came while a process was being started, and was held back."""
    yield
    raise KeyboardInterrupt


def workers() -> set[int]:
    """But for the server that they are forked from."""
    family = psutil.Process().children(recursive=True)
    return {p.pid for p in family if p.parent() and p.parent().pid in {c.pid for c in family}}


def test_a_view_that_cannot_be_written_is_not_a_worker_that_died(tmp_path: Path) -> None:
    """As where the sweep's output goes to `head`, or to a log on a full disk."""

    def broken(*said: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        list(local.run_cells([config(tmp_path)], broken, 1, talks))
    assert not workers()


@pytest.mark.parametrize("what", ["a cell", "the preparation"])
def test_an_interrupt_while_a_process_is_started_leaves_none(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "interrupts_held", interrupted)
    with pytest.raises(KeyboardInterrupt):
        if what == "a cell":
            list(local.run_cells([config(tmp_path)], lambda *said: None, 1, talks))
        else:
            local.apart(sleeps, lambda *said: None)
    assert not workers()
