"""Tables, figures and pages from the cells in a results folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Found:
    """A cell's folder, and what `cl-graft report DIR --json` prints of it."""

    path: Path
    cell: dict[str, Any]


def find(folders: Sequence[Path]) -> list[Found]:
    """All cells at or below the folders, complete or not, in a stable order."""
    from ..record import cells
    from ..result import collect, kept

    return [Found(p, kept(p) or collect(p)) for folder in folders for p in cells(folder)]


def gather(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """The result objects of `find`."""
    return [found.cell for found in find(folders)]
