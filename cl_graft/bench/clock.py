"""Times at which a run began and its steps ended, by the wall's clock and by the processor's."""

from __future__ import annotations

import time
from typing import Any

# of the wall's clock, and of the processor's on all threads of this process
Seconds = tuple[float, float]


class Clock:
    """Times, by `perf_counter`, at which a run began and each of its steps ended."""

    def __init__(self) -> None:
        self.times = [_now()]

    def tick(self, *_: Any) -> None:
        self.times.append(_now())

    def found(self) -> dict[str, Seconds]:
        """Seconds of a step between the first one's end and the last one's, and of the whole run until now."""
        begun, first, last, end = self.times[0], self.times[1], self.times[-1], _now()
        steps = len(self.times) - 2
        return {
            "step": tuple((b - a) / steps for a, b in zip(first, last, strict=True)),  # type: ignore[dict-item]
            "whole": tuple(b - a for a, b in zip(begun, end, strict=True)),  # type: ignore[dict-item]
        }


def _now() -> Seconds:
    return time.perf_counter(), time.process_time()
