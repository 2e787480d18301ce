"""Threads that take turns, exactly one running at any time, in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from threading import Semaphore, Thread


class _Stopped(BaseException):
    """Thrown into the threads that still wait when one has failed; no library's `except Exception` holds it."""


@dataclass
class _Lane:
    go: Semaphore = field(default_factory=lambda: Semaphore(0))
    back: Semaphore = field(default_factory=lambda: Semaphore(0))
    thread: Thread | None = None
    done: bool = False


@dataclass
class RoundRobin:
    """Jobs that take turns: each runs, alone, until it calls `pause`, and goes on when all others have done so."""

    current: int = 0  # the job whose turn it is
    _lanes: list[_Lane] = field(default_factory=list)
    _errors: list[BaseException] = field(default_factory=list)
    _stopping: bool = False

    def run(self, jobs: Sequence[Callable[[], None]]) -> None:
        """Returns when all have ended. Raises the first error in any of them, when all have been stopped."""
        self._lanes = [_Lane() for _ in jobs]
        for lane, job in zip(self._lanes, jobs, strict=True):
            lane.thread = Thread(target=self._work, args=(lane, job), daemon=True)
        try:
            while any(not lane.done for lane in self._lanes):
                for turn, lane in enumerate(self._lanes):
                    self.current = turn
                    if not lane.done:
                        self._resume(lane)
        finally:
            self._stop()

    def pause(self) -> None:
        """Let all other jobs have a turn; a job calls this."""
        if self._stopping:
            raise _Stopped
        lane = self._lanes[self.current]
        lane.back.release()
        lane.go.acquire()
        if self._stopping:
            raise _Stopped

    def _resume(self, lane: _Lane) -> None:
        assert lane.thread is not None
        if lane.thread.ident is None:
            lane.thread.start()
        else:
            lane.go.release()
        lane.back.acquire()
        if self._errors:
            raise self._errors[0]

    def _work(self, lane: _Lane, job: Callable[[], None]) -> None:
        try:
            job()
        except _Stopped:
            pass
        except BaseException as error:
            self._errors.append(error)
        finally:
            lane.done = True
            lane.back.release()

    def _stop(self) -> None:
        """Ends what has not ended, one thread after the other."""
        self._stopping = True
        for lane in self._lanes:
            if lane.thread is not None and lane.thread.ident is not None:
                lane.go.release()
                lane.thread.join()
