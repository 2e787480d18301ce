"""Tables and figures from the cells in a results folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def gather(folders: list[Path]) -> list[dict[str, Any]]:
    """The result objects of all cells at or below the folders, complete or not, in a stable order."""
    from ..record import cells
    from ..result import collect

    return [collect(path) for folder in folders for path in cells(folder)]
