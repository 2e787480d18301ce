"""A cell's events to trackers: each file here is one, `track:` names it. None is the only record, or in a cell's way.

The file defines `tracker(config, folder, identity)`, which makes a Tracker, or None where the config wants none.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from cl_graft.config import RunConfig
from cl_graft.store.result import ability

if TYPE_CHECKING:
    from PIL.Image import Image

Point = dict[str, float]  # a line of a training log: step, loss terms, learning rate, speed, memory


class Tracker(Protocol):
    """A listener told of a cell as it goes. A cell that goes on tells every experience again, from the first."""

    name: str

    def experience(self, record: dict[str, Any]) -> None:
        """An experience is whole; `record` is its experience.json."""

    def finish(self, result: dict[str, Any]) -> None:
        """The cell is complete; `result` is its result.json."""

    def abandon(self, error: BaseException) -> None:
        """End the attempt by this error; where it is locks.Busy, the cell has not failed but waits for another."""


def trackers(config: RunConfig, folder: Path, identity: dict[str, Any]) -> Trackers:
    """All trackers that the config chooses, as one.

    folder: the cell's; what they write goes into its `tracking`. identity: what its `cell.json` says.
    """
    made = (
        import_module(f"{__name__}.{name}").tracker(config, folder, identity)
        for name in ("wandb", *config.track)
    )
    return Trackers([tracker for tracker in made if tracker])


class Trackers:
    """Forwards to each. One that fails is left out from there on, with one line on stderr."""

    def __init__(self, chosen: Sequence[Tracker]):
        self.left = list(chosen)

    def experience(self, record: dict[str, Any]) -> None:
        self._each(lambda tracker: tracker.experience(record))

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


# --- what is tracked, under the same names everywhere ---


def of_experience(record: dict[str, Any]) -> dict[str, float]:
    """Scores and costs of an experience; what was not measured is not there."""
    values = {
        f"{metric}/{task}": cell["value"]
        for metric, row in record["scores"].items()
        for task, cell in row.items()
    }
    general = record["general"]
    for who, cells in general.items():
        told = {f"general/{metric}": cell["value"] for metric, cell in cells.items()}
        values |= {f"{key}/{who}": value for key, value in told.items()} if who else told
    for metric in next(iter(general.values()), {}):
        values[f"general/{metric}"] = ability(general, metric)
    if kl := record.get("kl_to_base"):
        values |= {f"kl_to_base/{way}": kl[way]["value"] for way in ("forward", "reverse")}
    values |= {f"seconds/{kind}": value for kind, value in record["seconds"].items()}
    values |= {key: record[key] for key in ("tokens", "peak_memory_mb", "pack_bytes")}
    return {key: value for key, value in values.items() if value is not None}


def of_point(point: Point) -> dict[str, float]:
    """All that training logged at one step."""
    return {f"train/{key}": value for key, value in point.items()}


def of_result(result: dict[str, Any]) -> dict[str, float]:
    """Metrics and total costs of a cell; what is not defined for it is not there."""
    values = {f"metrics/{key}": value for key, value in result["metrics"].items()}
    values |= {f"total_seconds/{kind}": value for kind, value in result["seconds"].items()}
    values |= {
        "pack_bytes_max": max(result["pack_bytes"], default=None),
        "base_bytes": result["base_bytes"],
        "total_tokens": result["tokens"],
        "peak_memory_mb_max": result["peak_memory_mb"],
    }
    return {key: value for key, value in values.items() if value is not None}


def along(points: Iterable[Point], begin: int) -> Iterator[tuple[int, Point]]:
    """Each point with its place on one axis of steps; every training job counts its own from 1."""
    before, last = begin, 0
    for point in points:
        step = int(point["step"])
        if step <= last:
            before += last
        last = step
        yield before + step, point


def matrices(result: dict[str, Any]) -> dict[str, list[list[float | None]]]:
    """Matrices of the score, `matrix`, and of every other metric, each row with its experience before it."""
    named = {"matrix": result["matrix"]}
    named |= {f"matrix/{name}": rows for name, rows in result["extra_matrices"].items()}
    return {
        name: [[experience, *row] for experience, row in enumerate(rows)]
        for name, rows in named.items()
    }


def figures(result: dict[str, Any]) -> dict[str, Image]:
    """The report's figures of this cell alone, under the names that end their files' there."""
    from PIL.Image import open as read

    from cl_graft.report.figures import FIGURES
    from cl_graft.report.style import png

    return {name: read(io.BytesIO(png(draw([result])))) for name, draw in FIGURES.items()}
