"""A cell's events to W&B, TensorBoard and CSV files. They are never the only record, and never in the cell's way."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from cl_graft.config import RunConfig


class Tracker(Protocol):
    """Told of a cell as it goes. A cell that is continued tells every stage again, from the first."""

    name: str

    def stage(self, record: dict[str, Any]) -> None:
        """A stage is whole; `record` is its stage.json."""

    def finish(self, result: dict[str, Any]) -> None:
        """The cell is complete; `result` is its result.json."""

    def abandon(self, error: BaseException) -> None:
        """This attempt ends by the error; where it is locks.Busy, the cell has not failed but waits for another."""


def trackers(config: RunConfig, folder: Path, identity: dict[str, Any]) -> Trackers:
    """All that the config chooses, as one.

    folder: the cell's; what they write goes into its `tracking`. identity: what its `cell.json` says.
    """
    from cl_graft.tracking.csv import Csv
    from cl_graft.tracking.tensorboard import TensorBoard
    from cl_graft.tracking.wandb import Wandb, resolve

    chosen: list[Tracker] = []
    if (mode := resolve(config.wandb)) != "off":
        chosen.append(Wandb(config, folder, identity, mode))
    if "tensorboard" in config.track:
        chosen.append(TensorBoard(folder / "tracking"))
    if "csv" in config.track:
        chosen.append(Csv(folder / "tracking"))
    return Trackers(chosen)


class Trackers:
    """Forwards to each. One that fails is left out from there on, with one line on stderr."""

    def __init__(self, chosen: Sequence[Tracker]):
        self.left = list(chosen)

    def stage(self, record: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.stage(record))

    def finish(self, result: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.finish(result))

    def abandon(self, error: BaseException) -> None:
        self._each(lambda tracker: tracker.abandon(error))

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for tracker in list(self.left):
            try:
                tell(tracker)
            except Exception as error:
                self.left.remove(tracker)
                reason = (str(error).strip() or type(error).__name__).split("\n", 1)[0].rstrip(".")
                print(
                    f"{tracker.name} failed ({reason}) and is left out from here on; results on disk "
                    "are not affected.",
                    file=sys.stderr,
                )
                with suppress(Exception):
                    tracker.abandon(error)
