"""Which cell is next, whoever runs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from cl_graft.config import RunConfig
from cl_graft.experiment.executors import Outcome

LIVES = 3  # attempts at a cell whose process dies without a word


class Queue:
    """What is left: fresh ones first; those that another holds up wait until nothing else is to be begun."""

    def __init__(self, cells: Sequence[RunConfig]):
        self.fresh, self.held = deque(cells), deque[RunConfig]()
        self.deaths: dict[str, int] = {}

    def next(self) -> tuple[RunConfig, bool] | None:
        """A cell, and whether it is to wait for what others make."""
        if self.fresh:
            return self.fresh.popleft(), False
        return (self.held.popleft(), True) if self.held else None

    def after(self, config: RunConfig, outcome: Outcome) -> Outcome | None:
        """The outcome to report of a cell, None if it is to be tried again."""
        if outcome.state == "busy":
            self.held.append(config)
            return None
        if outcome.state == "lost":
            self.deaths[config.cell] = self.deaths.get(config.cell, 0) + 1
            if self.deaths[config.cell] < LIVES:
                self.fresh.append(config)
                return None
        return outcome
