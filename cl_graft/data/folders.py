"""Where a task's folder is below --data-dir: several places are looked at, since each publisher has its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cl_graft.data.readers import DataError


def folder_of(data_dir: Path, roots: Sequence[str], name: str, otherwise: str) -> str:
    """The folder of that name below the first of the roots that has it, as a path from `data_dir`.

    otherwise: where its data are to be had, for the error. Raises DataError that says where it was looked for.
    """
    places = [f"{root}/{name}".lstrip("/") for root in roots]
    for place in places:
        if (data_dir / place).is_dir():
            return place
    *first, last = [str(data_dir / place) for place in places]
    looked = f"{', '.join(first)} or {last}" if first else last
    raise DataError(f"there is no folder {looked}; {otherwise}.")
