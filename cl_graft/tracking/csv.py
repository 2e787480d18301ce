"""tracking/scores.csv and tracking/losses.csv, written whole each time: a continued cell has each line once."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cl_graft.config import RunConfig
from cl_graft.store.files import write_text

SCORES = ("experience", "task", "metric", "value", "n", "stderr")
LAST = ("learning_rate", "grad_norm", "tokens_per_second", "peak_memory_mb", "epoch", "seconds")


def tracker(config: RunConfig, folder: Path, identity: dict[str, Any]) -> Csv:
    return Csv(folder / "tracking")


class Csv:
    name = "CSV"

    def __init__(self, folder: Path):
        self.folder = folder
        self.scores: list[dict[str, Any]] = []
        self.losses: list[dict[str, Any]] = []

    def experience(self, record: dict[str, Any]) -> None:
        experience = record["experience"]
        rows = [
            (task, metric, cell)
            for metric, row in record["scores"].items()
            for task, cell in row.items()
        ]
        rows += [
            (f"general with {who}" if who else "general", metric, cell)
            for who, cells in record["general"].items()
            for metric, cell in cells.items()
        ]
        if kl := record.get("kl_to_base"):
            rows += [
                (record["task"], f"kl_to_base {way}", {"n": kl["n"], **kl[way]})
                for way in ("forward", "reverse")
            ]
        self.scores += [
            {"experience": experience, "task": t, "metric": m, **cell} for t, m, cell in rows
        ]
        self.losses += [{"experience": experience, **point} for point in record["losses"]]
        write_text(self.folder / "scores.csv", text(SCORES, self.scores))
        write_text(self.folder / "losses.csv", text(columns(self.losses), self.losses))

    def finish(self, result: dict[str, Any]) -> None:
        pass

    def abandon(self, error: BaseException) -> None:
        pass


def columns(losses: Iterable[dict[str, Any]]) -> list[str]:
    """Experience, step, every loss term in order of appearance, then what each point has."""
    known = dict.fromkeys(key for point in losses for key in point)
    terms = [key for key in known if key not in ("experience", "step", *LAST)]
    return ["experience", "step", *terms, *(key for key in LAST if key in known)]


def text(columns: Sequence[str], rows: Iterable[dict[str, Any]]) -> str:
    """What is missing in a row is empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
